"""The embedded Sudoku model: from random weights to a checkpoint in the released format, and its figures.

python -m dgemma.train.recipes.sudoku train --minutes 120 --out runs/sudoku
python -m dgemma.train.recipes.sudoku export runs/sudoku dgemma/embedded/sudoku
python -m dgemma.train.recipes.sudoku evaluate sudoku --puzzles 1000
"""

import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from dgemma import embedded
from dgemma.checkpoints.save import save_model
from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig, Rope
from dgemma.decoding.blocks import Request, generate
from dgemma.decoding.events import Finished
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma
from dgemma.text.small import character_tokenizer
from dgemma.train.pretrain import Schedule, train
from dgemma.train.recipes.sudoku_data import Bases, draw, fingerprints, make_bases, puzzles

CANVAS = 90
"""Nine lines of nine digits; the last line break is the end of the turn."""

TRAIN_SEED, TEST_SEED, BATCH_OF_BASES = 1, 1_000_001, 500
GIVENS = {"at least 45": (45, 56), "36-44": (36, 44), "30-35": (30, 35), "at most 29": (25, 29)}
DECODING = GenerationConfig(max_new_tokens=CANVAS, eos_token_id=(1, 6))

app = typer.Typer(add_completion=False, help=__doc__)


def config(layers: int, hidden: int) -> ModelConfig:
    """The network's sizes: heads of 32, 8 experts of which 2 speak, short wavelengths for a short text."""
    return ModelConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_experts=8,
        top_k_experts=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        num_global_key_value_heads=hidden // 32,
        global_head_dim=32,
        layer_types=(SLIDING,) * (layers - 1) + (FULL,),
        sliding_window=256,
        canvas_length=CANVAS,
        max_position_embeddings=1024,
        rope_sliding=Rope(100.0),
        rope_full=Rope(100.0, "proportional", 1.0),
        dtype="float32",
        eos_token_id=(1, 6),
    )


@cache
def _alphabet() -> tuple[np.ndarray, int, int, list[int], list[int]]:
    """Token ids: the digits, line break, end of turn, and the chat template's text before and after a puzzle."""
    tokenizer = character_tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    digits = np.array(encode("0123456789"))
    return (
        digits,
        encode("\n")[0],
        encode("<turn|>")[0],
        encode("<bos><|turn>user\n"),
        encode("<turn|>\n<|turn>model\n"),
    )


def tokens(puzzle: np.ndarray, solution: np.ndarray) -> tuple[Tensor, Tensor]:
    """Prompts int64 [n, 98] and answers int64 [n, 90] of grids [n, 81], as chat template and tokenizer give them."""
    digits, newline, end, before, after = _alphabet()
    lines = np.full((2, len(puzzle), 9, 10), newline)
    lines[..., :9] = digits[np.stack((puzzle, solution)).astype(np.int64).reshape(2, -1, 9, 9)]
    question, answer = lines.reshape(2, -1, CANVAS)
    answer[:, -1] = end
    n = len(puzzle)
    prompt = np.concatenate((np.tile(before, (n, 1)), question[:, :-1], np.tile(after, (n, 1))), axis=1)
    return torch.from_numpy(prompt), torch.from_numpy(answer)


def load_bases(path: Path, count: int, seed: int) -> Bases:
    """Base puzzles from a file, made in batches of 500 (each its own seed) if it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = range(0, count, BATCH_OF_BASES)
        parts = [make_bases(min(BATCH_OF_BASES, count - n), seed + i) for i, n in enumerate(batches)]
        solution, removal = (np.concatenate([getattr(p, name) for p in parts]) for name in ("solution", "removal"))
        np.savez(path, solution=solution, removal=removal)
    stored = np.load(path)
    return Bases(stored["solution"], stored["removal"])


def solve(model: DiffusionGemma, prompts: Tensor, options: GenerationConfig, batch: int = 100) -> list[Finished]:
    """Answers to prompts [n, S], with seeds 0, 1, 2 …"""
    found: dict[int, Finished] = {}
    for start in range(0, len(prompts), batch):
        noises = [Noise(start + i, model.config.vocab_size, CANVAS) for i in range(len(prompts[start : start + batch]))]
        requests = [Request(p, options, n) for p, n in zip(prompts[start : start + batch], noises, strict=True)]
        found |= {start + e.row: e for e in generate(model, requests) if isinstance(e, Finished)}
    return [found[i] for i in range(len(prompts))]


def measure(
    model: DiffusionGemma, bases: Bases, givens: tuple[int, int], count: int, options: GenerationConfig
) -> dict[str, float]:
    """Shares of whole grids, cells and clues that are right, and mean steps, over `count` puzzles."""
    rng = np.random.default_rng(0)
    wanted = rng.integers(givens[0], givens[1] + 1, size=count)
    allowed = [np.flatnonzero(bases.fewest <= n) for n in wanted]
    puzzle, solution = puzzles(bases[np.array([rng.choice(choice) for choice in allowed])], wanted, rng)
    prompt, answer = tokens(puzzle, solution)
    finished = solve(model, prompt, options)
    got = torch.tensor([(f.tokens + [-1] * CANVAS)[:CANVAS] for f in finished])
    cells = torch.arange(CANVAS) % 10 != 9
    right = (got == answer)[:, cells]
    return {
        "exact": (got == answer).all(1).float().mean().item(),
        "cells": right.float().mean().item(),
        "clues kept": right[torch.from_numpy(puzzle > 0)].float().mean().item(),
        "steps": float(np.mean([sum(f.steps) for f in finished])),
        "converged": float(np.mean([all(f.converged) for f in finished])),
    }


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="folder for data, state and log; an earlier run in it is continued")],
    minutes: Annotated[float, typer.Option(help="training time, earlier runs in the folder counted in")] = 120,
    layers: int = 4,
    hidden: int = 128,
    batch: Annotated[int, typer.Option(help="puzzles a step")] = 32,
    bases: Annotated[int, typer.Option(help="base grids, each with all of its symmetries")] = 6000,
    givens: Annotated[tuple[int, int], typer.Option(help="fewest and most givens")] = (27, 54),
    device: str = "cpu",
) -> None:
    """Train from random weights, or continue."""
    data = load_bases(out / "bases.npz", bases, TRAIN_SEED)
    held_out = load_bases(out / "held_out.npz", 500, TEST_SEED)
    overlap = set(fingerprints(data)) & set(fingerprints(held_out))
    if overlap:
        raise ValueError(f"{len(overlap)} held-out grids may be symmetric forms of training grids; change TEST_SEED")

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for puzzle, solution in draw(data, batch, givens, seed):
            prompt, answer = tokens(puzzle, solution)
            yield prompt.to(device), answer.to(device)

    def evaluate(model: DiffusionGemma) -> dict[str, float]:
        return {name: measure(model, held_out, span, 50, DECODING)["exact"] for name, span in GIVENS.items()}

    model = DiffusionGemma(config(layers, hidden)).to(device).init_weights(seed=0)
    train(model, batches, Schedule(minutes), out, evaluate)


@app.command()
def export(run: Path, directory: Path) -> None:
    """Write a run's averaged weights as a checkpoint in the released format, with tokenizer and defaults."""
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    sizes = state["average"]
    layers = 1 + max(int(name.split(".")[1]) for name in sizes if name.startswith("layers."))
    model = DiffusionGemma(config(layers, sizes["norm.weight"].shape[0]))
    model.load_state_dict(sizes)
    save_model(model, directory, DECODING, extras=embedded.HERE / "sudoku")  # for the chat template
    character_tokenizer().save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@app.command()
def evaluate(
    source: str, puzzles_each: Annotated[int, typer.Option("--puzzles")] = 1000, held_out: Path | None = None
) -> None:
    """Measure a checkpoint on held-out puzzles, by number of givens; prints the table of its card."""
    from dgemma import load

    lm = load(source)
    bases = load_bases(held_out, 500, TEST_SEED) if held_out else make_bases(500, TEST_SEED)
    print("| givens | puzzles | exact grid | correct cells | clues kept | mean steps | converged |")
    print("|---" * 7 + "|")
    for name, span in GIVENS.items():
        m = measure(lm.model, bases, span, puzzles_each, lm.defaults)
        shares = " | ".join(f"{100 * m[key]:.1f} %" for key in ("exact", "cells", "clues kept"))
        print(f"| {name} | {puzzles_each} | {shares} | {m['steps']:.1f} | {100 * m['converged']:.1f} % |", flush=True)


if __name__ == "__main__":
    # Page faults cost a third of the time otherwise; the allocator reads these when the process starts.
    if "MALLOC_MMAP_MAX_" not in os.environ:
        tuned = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "100000000"}
        os.execve(
            sys.executable, [sys.executable, "-m", "dgemma.train.recipes.sudoku", *sys.argv[1:]], os.environ | tuned
        )
    app()
