"""Makes the checkpoints and cases: `python -m dgemma.conformance.make DIRECTORY`.

Draws are of integer generators, and results are computed in float64, so every machine makes the same. A case's seed is
the first under which no decision is near (`MARGIN`), and its own trap shows, in tokens or well above the tolerance.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.save import save_model
from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig, Rope, VisionConfig
from dgemma.conformance.adapter import Prompt, Recorded
from dgemma.conformance.case import (
    DATA,
    OPTIONAL,
    TOLERANCE,
    Case,
    Outcome,
    answer_outcome,
    encoded_outcome,
    first_difference,
    write,
)
from dgemma.conformance.plain import Plain
from dgemma.conformance.traps import TRAPS
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Patches, Placed

MARGIN = 2e-4
"""The least distance of any decision from the other side, in nats, probability or scaled logits."""
SEEDS = 400
"""Tried for a case at most."""
RIGHT = "right"

WINDOW = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_experts=4,
    top_k_experts=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=1,
    global_head_dim=16,
    layer_types=(SLIDING, FULL),
    sliding_window=7,
    canvas_length=8,
    max_position_embeddings=512,
    dtype="bfloat16",
    eos_token_id=(1, 39),
)
GLOBAL = replace(
    WINDOW,
    num_attention_heads=4,
    global_head_dim=8,
    num_global_key_value_heads=2,
    num_key_value_heads=1,
    layer_types=(FULL, SLIDING, FULL),
    rope_full=Rope(1e4, "proportional", 0.5),
)
LIVELY = replace(GLOBAL, final_logit_softcapping=3.0, vocab_size=61, layer_types=(SLIDING, SLIDING, FULL))
TOWER = VisionConfig.from_dict(
    {
        "model_type": "gemma4_vision",
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "global_head_dim": 12,
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "position_embedding_size": 40,
        "standardize": True,
        "use_clipped_linears": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
)
PICTURES = replace(GLOBAL, vision=TOWER, image_token_id=GLOBAL.vocab_size - 1)
LONG = replace(
    WINDOW, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_attention_heads=1, num_key_value_heads=1,
    global_head_dim=8, layer_types=(FULL, FULL), num_experts=2, top_k_experts=1, max_position_embeddings=16384,
)  # fmt: skip
CHECKPOINTS = {"window": WINDOW, "global": GLOBAL, "lively": LIVELY, "pictures": PICTURES, "long": LONG}
LOUD = ("lively",)
"""Checkpoints whose canvases never settle: self-conditioning is strong. In the others rounding dies out."""
QUIET = {
    "self_conditioning.down_proj.weight": 0.1,
    "post_attention_layernorm.weight": 0.6,
    "post_feedforward_layernorm.weight": 0.6,
}
DEFAULTS = GenerationConfig(
    max_new_tokens=24,
    max_denoising_steps=14,
    entropy_bound=0.2,
    confidence_threshold=0.1,
    eos_token_id=(1, 39, 20),
)


@dataclass(frozen=True)
class Plan:
    """A case before it has values. prompts: the lengths of each row's pieces; traps: those that must show in it."""

    name: str
    about: str
    checkpoint: str
    kind: str
    prompts: tuple[tuple[int, ...], ...] = ((9,),)
    shared: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    previous: bool = False
    picture: tuple[int, int] = (0, 0)
    traps: tuple[str, ...] = ()


def trap(name: str, checkpoint: str, kind: str, prompts: tuple[tuple[int, ...], ...] = ((9,),), **given: Any) -> Plan:
    """A case that is named after the trap it is for."""
    return Plan(name, f"wrong if {TRAPS[name].__doc__}", checkpoint, kind, prompts, traps=(name,), **given)


PADDED = ((3,), (14,), (9,))
CHUNKED = ((13, 8, 1, 5),)
CAPPED = {"max_denoising_steps": 5, "max_new_tokens": 16}
PLANS = [
    Plan("sliding_layers_behind_a_long_prefix", "a prompt three times the window", "window", "encode", ((21,),)),
    Plan("global_layers", "values made of keys, in a layer that others read", "global", "encode", ((21,),)),
    Plan("self_conditioning", "a step with the last one's logits", "lively", "encode", previous=True),
    Plan("pictures", "a prompt with a picture", "pictures", "encode", ((5, 6),), picture=(3, 4)),
    Plan("an_answer_about_a_picture", "blocks behind a picture", "pictures", "generate", ((5, 6),), picture=(3, 4)),
    Plan("ends_within_a_block", "an end token cuts the answer", "window", "generate", ((5,), (12,), (26,))),
    Plan("many_rows", "rows that settle at different steps", "global", "generate", ((9,), (3,), (17,), (26,))),
    trap("history_includes_the_current_step", "window", "generate"),
    trap("accepts_on_the_whole_sum", "window", "generate"),
    trap("acceptance_sticks", "window", "generate"),
    trap("temperature_by_steps_done", "window", "generate"),
    trap("temperature_reaches_t_min", "window", "generate", options={"t_min": 0.1, "t_max": 2.0}),
    trap("answers_with_the_noisy_canvas", "window", "generate", options={"max_denoising_steps": 4}),
    trap("commits_the_noisy_canvas", "global", "generate", options={"max_denoising_steps": 4}),
    trap("commits_the_proposal", "window", "generate"),
    trap("zero_logits_on_the_first_step", "lively", "generate", options=CAPPED),
    trap("stale_self_conditioning_in_a_new_block", "lively", "generate", options=CAPPED),
    trap("feeds_back_unscaled_logits", "lively", "generate", options=CAPPED),
    trap("soft_cap_in_bfloat16", "lively", "generate", options=CAPPED),
    trap("soft_cap_after_temperature", "lively", "generate", options=CAPPED),
    trap("right_padding_is_attended", "global", "encode", PADDED),
    trap("left_padding_is_attended", "global", "encode", PADDED),
    trap("right_padding_leaves_a_gap_in_positions", "global", "encode", PADDED),
    trap("rows_read_their_neighbours_prefix", "window", "generate", PADDED),
    trap("prefix_is_stale_after_a_commit", "global", "generate"),
    trap("chunks_are_read_in_both_directions", "global", "encode", CHUNKED),
    trap("chunks_forget_those_before", "global", "encode", CHUNKED),
    trap("end_tokens_from_config_json", "window", "generate"),
    trap("answers_are_whole_canvases", "global", "generate", options={"max_new_tokens": 13}),
    trap("last_canvas_is_cut_to_the_limit", "global", "generate", options={"max_new_tokens": 13}),
    trap("finished_counts_as_converged", "window", "generate", options={"max_denoising_steps": 5}),
    trap("generation_writes_the_prompts_cache", "global", "generate", ((16,), (18,)), shared=12),
    trap("forks_share_the_page_being_filled", "global", "encode", ((15,), (22,), (16,)), shared=13),
    trap("grouped_experts_mix_up_their_weights", "window", "encode", ((11,),)),
    trap("grouped_experts_round_to_bfloat16", "lively", "encode", ((11,),)),
    trap("the_window_reaches_one_token_too_far", "window", "encode", ((21,),)),
    trap("the_canvas_sees_a_band_of_the_prefix", "window", "encode", ((21,),)),
    trap("values_are_the_rotated_keys", "global", "encode", ((11,),)),
    trap("the_canvas_takes_the_encoders_scalars", "global", "encode", ((11,),)),
    trap("pictures_are_read_causally", "pictures", "encode", ((5, 6),), picture=(3, 4)),
    trap("pictures_are_seen_both_ways_in_sliding_layers_only", "pictures", "encode", ((5, 6),), picture=(3, 4)),
]
MEMORY = Plan(
    "prefill_masks_materialised",
    "wrong if scores or a mask of a long prompt are made in one piece",
    "long",
    "memory",
    ((12288,),),
)


def checkpoint(name: str, directory: Path) -> None:
    """A random checkpoint in the released format: no norm, scale or scalar is 1, and the modes' scalars differ."""
    config = CHECKPOINTS[name]
    model = empty_model(config, torch.bfloat16).to_empty(device="cpu")
    fill(model, list(CHECKPOINTS).index(name), name in LOUD)
    save_model(model, directory, DEFAULTS)


@torch.no_grad()
def fill(model: DiffusionGemma, seed: int, loud: bool) -> None:
    draws = np.random.Generator(np.random.Philox(key=1000 + seed))
    order = np.random.Generator(np.random.Philox(key=3)).permutation(model.config.vocab_size)
    for name, tensor in model.state_dict().items():
        uniform = torch.from_numpy(draws.random(tuple(tensor.shape)))
        if tensor.dim() > 1:
            deviation = 1.0 if name == "embed_tokens.weight" else tensor.shape[-1] ** -0.5
            values = (2 * uniform - 1) * math.sqrt(3) * deviation
        else:
            values = 0.5 + 0.9 * uniform
        if not loud:
            # A position mostly believes its own token, the more so the longer that token's embedding is: doubtful ones
            # are drawn anew until they fit, and canvases settle one by one.
            if name == "embed_tokens.weight":
                values *= torch.linspace(0.3, 0.75, len(order))[torch.from_numpy(order)][:, None]
            values *= next((factor for end, factor in QUIET.items() if name.endswith(end)), 1.0)
        tensor.copy_(values)


def drafted(plan: Plan, seed: int) -> Case:
    """The plan with draws of this seed, without results."""
    config = CHECKPOINTS[plan.checkpoint]
    options = DEFAULTS.with_options(**plan.options)
    size, steps = config.canvas_length, options.max_denoising_steps
    blocks = math.ceil(options.max_new_tokens / size)
    prompts, noise = [], []
    common = text(config, plan.shared, 0, seed)
    for r, lengths in enumerate(plan.prompts):
        tokens = (*common, *text(config, sum(lengths) - plan.shared, r + 1, seed))
        ends = np.cumsum(lengths)
        prompt = Prompt(tuple(tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)))
        prompts.append(with_picture(prompt, plan, config, seed) if any(plan.picture) else prompt)
        draws = Noise(1000 * seed + r, config.vocab_size, size)
        renoise, uniform = (
            np.stack([np.stack([draw(b, s + 1).numpy() for s in range(steps)]) for b in range(blocks)])
            for draw in (draws.renoise, draws.uniform)
        )
        noise.append(Recorded(np.stack([draws.canvas(b).numpy() for b in range(blocks)]), renoise, uniform))
    canvas = np.stack([n.canvas[0] for n in noise])
    previous = None
    if plan.previous:
        shape = (len(prompts), size, config.vocab_size)
        previous = (8 * np.random.Generator(np.random.Philox(key=seed)).random(shape) - 4).astype(np.float32)
    case = Case(plan.name, plan.about, plan.checkpoint, plan.kind, tuple(prompts), plan.shared, plan.options)
    return replace(case, noise=tuple(noise), canvas=canvas, previous=previous)


def text(config: ModelConfig, length: int, row: int, seed: int) -> tuple[int, ...]:
    """Random tokens, none of which stands for a picture."""
    if not length:
        return ()
    return tuple(Noise(10_000_000 + 100 * seed + row, config.vocab_size - 1, length).canvas(0).tolist())


def with_picture(prompt: Prompt, plan: Plan, config: ModelConfig, seed: int) -> Prompt:
    """The picture, so many soft tokens high and wide, between the first piece and the second."""
    assert config.vision
    assert config.image_token_id
    rows, columns = plan.picture
    k = config.vision.pooling_kernel_size
    shape = (rows * columns * k * k, 3 * config.vision.patch_size**2)
    patches = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, shape, np.uint8)
    first, *rest = prompt.pieces
    begin, end = len(first), len(first) + rows * columns
    shown = Placed(Patches(patches, rows * k, columns * k), begin, end)
    return Prompt(((*first, *[config.image_token_id] * (end - begin)), *rest), (shown,))


def outcome(engine: Plain, case: Case) -> Outcome:
    if case.kind == "encode":
        return encoded_outcome(engine.encode(case.prompts, case.canvas, case.previous, case.shared))
    return answer_outcome(engine.generate(case.requests, case.shared))


def firsts(golden: Outcome, found: Outcome) -> Outcome:
    """Where a wrong outcome differs first: for an engine that shows everything, and for one that shows what it must."""
    places: Outcome = {}
    bare = {place: array for place, array in found.items() if not place.endswith(OPTIONAL)}
    for shown in (found, bare):
        if different := first_difference(golden, shown):
            places[different.place] = np.empty(0, np.int32) if different.found is None else different.found
    return places


def clear(golden: Outcome, place: str, found: np.ndarray) -> bool:
    """Whether a wrong value is well beyond the tolerance."""
    right = golden[place]
    if np.issubdtype(right.dtype, np.integer) or right.shape != found.shape:
        return True
    return float(np.abs(right - found).max()) > 5 * TOLERANCE * max(1.0, float(np.sqrt(np.mean(right**2))))


def cases(data: Path) -> Iterator[Case]:
    """All cases of the checkpoints in a directory."""
    kinds: dict[str, type[Plain]] = {RIGHT: Plain, **TRAPS}
    engines = {name: {n: kind() for n, kind in kinds.items()} for name in CHECKPOINTS if name != MEMORY.checkpoint}
    for name, some in engines.items():
        for engine in some.values():
            engine.load(data / name)
    for i, plan in enumerate(PLANS):
        own = engines[plan.checkpoint]
        yield next(found for seed in range(i * SEEDS, (i + 1) * SEEDS) if (found := settled(plan, seed, own)))
    tokens = text(LONG, sum(MEMORY.prompts[0]), 0, 0)
    prompt, canvas = Prompt((tokens,)), np.zeros((1, LONG.canvas_length), np.int64)
    case = Case(MEMORY.name, MEMORY.about, MEMORY.checkpoint, MEMORY.kind, (prompt,), most=len(tokens) ** 2 // 2)
    yield replace(case, canvas=canvas)


def settled(plan: Plan, seed: int, engines: dict[str, Plain]) -> Case | None:
    """The case of a seed, if it will do."""
    case = drafted(plan, seed)
    right = engines[RIGHT]
    right.margin = math.inf
    golden = outcome(right, case)
    # What other machines round otherwise must not decide anything.
    if right.margin < MARGIN:
        return None
    if case.kind == "generate" and not telling(plan, case, golden):
        return None
    for name in plan.traps:
        found = firsts(golden, outcome(engines[name], case))
        if not found or not all(clear(golden, *each) for each in found.items()):
            return None
        if plan.name != "finished_counts_as_converged" and all(place.endswith(OPTIONAL) for place in found):
            return None
    wrong = {name: firsts(golden, outcome(engines[name], case)) for name in TRAPS}
    wrong = {name: places for name, places in wrong.items() if all(clear(golden, *p) for p in places.items())}
    return replace(case, golden=golden, wrong={name: places for name, places in wrong.items() if places})


def telling(plan: Plan, case: Case, golden: Outcome) -> bool:
    """What a case without a trap of its own has to show."""
    ends = DEFAULTS.eos_token_id
    tokens = [golden[f"row {r} tokens"] for r in range(len(case.prompts))]
    if plan.name == "ends_within_a_block":
        return sum(t[-1] in ends and len(t) % 8 != 0 for t in tokens) >= 2 and all(len(t) > 8 for t in tokens)
    if plan.name == "finished_counts_as_converged":
        return len({int(v[0]) for place, v in golden.items() if place.endswith("converged")}) == 2
    return plan.name != "many_rows" or len({int(v[0]) for p, v in golden.items() if p.endswith("steps")}) > 3


def main(directory: Path) -> None:
    """Writes a folder for each checkpoint and one of cases."""
    for name in CHECKPOINTS:
        checkpoint(name, directory / name)
    (directory / "cases").mkdir(exist_ok=True)
    for case in cases(directory):
        write(case, directory / "cases")
        print(f"{case.name}: {len(case.wrong)} traps show", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
