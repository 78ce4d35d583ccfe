"""dgemma as an engine under test: its network, its loop, its caches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgemma.checkpoints.load import load_model
from dgemma.config import GenerationConfig
from dgemma.conformance.adapter import Answer, Block, Encoded, Prompt, Recorded, Request
from dgemma.decoding import blocks, events
from dgemma.decoding.noise import Noise
from dgemma.model.attention import Span
from dgemma.model.cache import Cache
from dgemma.picture import within


class Dgemma:
    def load(self, directory: Path) -> None:
        self.model = load_model(directory, "cpu", torch.float32)
        self.defaults = GenerationConfig.from_file(directory / "generation_config.json")

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[Prompt], canvas: np.ndarray, previous: np.ndarray | None, shared: int
    ) -> list[Encoded]:
        given = torch.from_numpy(canvas)
        believed = None if previous is None else torch.from_numpy(previous)
        if not shared:
            cache = self.model.new_cache(len(prompts))
            for number in range(max(len(prompt.pieces) for prompt in prompts)):
                self._encode(prompts, number, cache)
            logits = self.model.denoise(given, cache, believed)
            return [Encoded(logits[b].numpy(), *self._shown(cache, b)) for b in range(len(prompts))]
        prefix = self.model.new_cache()
        self.model.encode([torch.tensor(prompts[0].tokens[:shared])], prefix)
        forks = [prefix.fork() for _ in prompts]
        for prompt, fork in zip(prompts, forks, strict=True):
            self.model.encode([torch.tensor(prompt.tokens[shared:])], fork)
        found = []
        for b, fork in enumerate(forks):
            soft = None if believed is None else believed[b : b + 1]
            logits = self.model.denoise(given[b : b + 1], fork, soft)
            found.append(Encoded(logits[0].numpy(), *self._shown(fork, 0)))
        return found

    def generate(self, requests: Sequence[Request], shared: int) -> list[Answer]:
        if not shared:
            return self._run(requests, None, 0)
        prefix = self.model.new_cache()
        with torch.inference_mode():
            self.model.encode([torch.tensor(requests[0].prompt.tokens[:shared])], prefix)
        return [answer for request in requests for answer in self._run([request], prefix, shared)]

    def _run(self, requests: Sequence[Request], cache: Cache | None, shared: int) -> list[Answer]:
        size = self.model.config.canvas_length
        rows = [
            blocks.Request(
                torch.tensor(r.prompt.tokens[shared:]),
                self.defaults.with_options(**r.options),
                Replayed(r.noise, self.model.config.vocab_size, size),
                pictures=r.prompt.pictures,
            )
            for r in requests
        ]
        steps: list[list[list[events.Step]]] = [[] for _ in rows]
        answers = [Answer([], []) for _ in rows]
        for event in blocks.generate(self.model, rows, cache):
            if isinstance(event, events.Step):
                if event.step == 1:
                    steps[event.row].append([])
                steps[event.row][-1].append(event)
            elif isinstance(event, events.Block):
                done = steps[event.row][-1]
                best, canvas, entropy = (
                    np.stack([getattr(step, name).numpy() for step in done]) for name in ("best", "canvas", "entropy")
                )
                answers[event.row].blocks.append(Block(best, canvas, entropy, event.converged))
            elif isinstance(event, events.Finished):
                answers[event.row].tokens = event.tokens
        return answers

    def _encode(self, prompts: Sequence[Prompt], number: int, cache: Cache) -> None:
        """One piece of each prompt that has as many."""
        rows, pictures = [], []
        for prompt in prompts:
            begin = sum(map(len, prompt.pieces[:number]))
            tokens = prompt.pieces[number] if number < len(prompt.pieces) else ()
            rows.append(torch.tensor(tokens, dtype=torch.int64))
            pictures.append(within(prompt.pictures, begin, begin + len(tokens)))
        self.model.encode(rows, cache, pictures=pictures)

    def _shown(self, cache: Cache, row: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Keys and values that each layer can reach."""
        keys, values = [], []
        one = Cache(cache.config, 0, cache.dtype, cache.device, cache.format)
        one.rows = [cache.rows[row]]
        for layer in range(self.model.config.num_hidden_layers):
            pair = one.read(layer, Span(0, 1, self.model.config.canvas_length, one.lengths[0], causal=False))
            assert pair is not None
            keys.append(pair[0][0].numpy().copy())
            values.append(pair[1][0].numpy().copy())
        return keys, values


class Replayed(Noise):
    """Recorded draws."""

    def __init__(self, recorded: Recorded, vocab_size: int, canvas_length: int):
        super().__init__(0, vocab_size, canvas_length)
        self.recorded = recorded

    def canvas(self, block: int) -> Tensor:
        return torch.from_numpy(self.recorded.canvas[block])

    def renoise(self, block: int, step: int) -> Tensor:
        return torch.from_numpy(self.recorded.renoise[block, step - 1])

    def uniform(self, block: int, step: int) -> Tensor:
        return torch.from_numpy(self.recorded.uniform[block, step - 1])
