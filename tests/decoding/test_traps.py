"""Traps that other engines fell into. Each is put into our code here, and the check of it must notice.

A check without its trap passes; `planted` holds the trap in place while the same check runs again and has to fail.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import checks
from decoding.checks import C, planted
from torch import Tensor

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.decoding import blocks, sampler, vocabulary
from dgemma.decoding.blocks import Request
from dgemma.decoding.denoise import Canvas
from dgemma.kernels import native
from dgemma.model import attention
from dgemma.model.cache import Cache
from dgemma.model.experts import Experts
from dgemma.model.network import DiffusionGemma

Change = tuple[Any, str, Any]


def history_includes_the_current_step() -> list[Change]:
    is_still = sampler.is_still
    return [(sampler, "is_still", lambda best, history, *rest: is_still(best, [*history, best], *rest))]


def accepts_on_the_whole_sum() -> list[Change]:
    def accept(entropy: Tensor, bound: Tensor) -> Tensor:
        ascending, order = entropy.sort(dim=-1)
        kept = ascending.cumsum(-1) <= bound[:, None]
        return torch.zeros_like(kept).scatter(-1, order, kept)

    return [(sampler, "accept", accept)]


def acceptance_sticks() -> list[Change]:
    accept, last = sampler.accept, {}

    def sticky(entropy: Tensor, bound: Tensor) -> Tensor:
        accepted = accept(entropy, bound)
        if len(entropy) in last:
            accepted = accepted | last[len(entropy)]
        last[len(entropy)] = accepted
        return accepted

    return [(sampler, "accept", sticky)]


def temperature_by_steps_done() -> list[Change]:
    temperature = GenerationConfig.temperature
    done = lambda self, left: temperature(self, self.max_denoising_steps - left)  # noqa: E731
    return [(GenerationConfig, "temperature", done)]


def temperature_reaches_t_min() -> list[Change]:
    temperature = GenerationConfig.temperature
    return [(GenerationConfig, "temperature", lambda self, left: temperature(self, left - 1))]


def answers_with_the_noisy_canvas() -> list[Change]:
    settle = Request.settle

    def noisy(self: Request, canvas: Canvas) -> Any:
        return settle(self, replace(canvas, history=[canvas.tokens.cpu()]))

    return [(Request, "settle", noisy)]


def commits_the_noisy_canvas() -> list[Change]:
    commit = blocks.commit

    def noisy(model: Any, cache: Any, canvases: Any, requests: Any) -> None:
        commit(model, cache, [replace(c, history=[c.tokens.cpu()]) for c in canvases], requests)

    return [(blocks, "commit", noisy)]


def commits_the_proposal() -> list[Change]:
    """The sampled tokens, instead of the most probable ones, count as the best canvas."""
    read = vocabulary.read

    def sampled(*args: Any, **kwargs: Any) -> Any:
        reading = read(*args, **kwargs)
        return replace(reading, best=reading.proposal)

    return [(vocabulary, "read", sampled)]


def zero_logits_on_the_first_step() -> list[Change]:
    begin = Canvas.begin.__func__

    def mean_embedding(cls: type, model: DiffusionGemma, *rest: Any) -> Canvas:
        canvas = begin(cls, model, *rest)
        even = torch.full((C, model.config.vocab_size), 1 / model.config.vocab_size)
        canvas.soft = model.embed_tokens.soft(even)
        return canvas

    return [(Canvas, "begin", classmethod(mean_embedding))]


def stale_self_conditioning_in_a_new_block() -> list[Change]:
    begin, last = blocks.begin, {}

    def stale(model: Any, row: int, request: Request) -> Canvas:
        canvas = begin(model, row, request)
        if request.steps:
            canvas.soft = last[row].soft
        last[row] = canvas
        return canvas

    return [(blocks, "begin", stale)]


def feeds_back_unscaled_logits() -> list[Change]:
    read = vocabulary.read

    def unscaled(head: Any, states: Tensor, temperature: Tensor, uniform: Tensor, *rest: Any) -> Any:
        reading = read(head, states, temperature, uniform, *rest)
        return replace(reading, soft=read(head, states, torch.ones_like(temperature), uniform).soft)

    return [(vocabulary, "read", unscaled)]


def soft_cap_in_bfloat16() -> list[Change]:
    def rounded(scores: Tensor, cap: float, temperature: Tensor) -> Tensor:
        capped = torch.tanh(scores.bfloat16() / cap) * cap
        return scores.copy_(capped / temperature / math.log(2))

    return [(vocabulary, "log2_weights_", rounded), (native, "fits", lambda *parts: False)]


def soft_cap_after_temperature() -> list[Change]:
    read = vocabulary.read

    def after(head: Any, states: Tensor, temperature: Tensor, *rest: Any) -> Any:
        scaled = (states.float() / temperature[:, None, None]).to(states.dtype)
        return read(head, scaled, torch.ones_like(temperature), *rest)

    return [(vocabulary, "read", after)]


def _padded(left: bool) -> list[Change]:
    encode = DiffusionGemma.encode

    def pad(self: DiffusionGemma, rows: Any, cache: Cache, logits: bool = False, **rest: Any) -> Any:
        rows = [torch.as_tensor(row) for row in rows]
        longest = max(map(len, rows))
        fill = [row.new_zeros(longest - len(row)) for row in rows]
        pairs = [(f, row) if left else (row, f) for f, row in zip(fill, rows, strict=True)]
        return encode(self, [torch.cat(pair) for pair in pairs], cache, logits, **rest)

    return [(DiffusionGemma, "encode", pad)]


def right_padding_is_attended() -> list[Change]:
    return _padded(left=False)


def left_padding_is_attended() -> list[Change]:
    return _padded(left=True)


def right_padding_leaves_a_gap_in_positions() -> list[Change]:
    rotations = DiffusionGemma._rotations

    def from_the_longest(self: DiffusionGemma, spans: Any) -> Any:
        return rotations(self, [replace(span, past=max(s.past for s in spans)) for span in spans])

    return [(DiffusionGemma, "_rotations", from_the_longest)]


def rows_read_their_neighbours_prefix() -> list[Change]:
    select = Cache.select
    return [(Cache, "select", lambda self, rows: select(self, range(len(rows))))]


def prefix_is_stale_after_a_commit() -> list[Change]:
    read = Cache.read

    def stale(self: Cache, layer: int, span: Any) -> Any:
        kept = self.__dict__.setdefault("kept", {})
        if span.causal:
            return read(self, layer, span)
        return kept.setdefault((layer, span.row, span.rows), read(self, layer, span))

    return [(Cache, "read", stale)]


def chunks_are_read_in_both_directions() -> list[Change]:
    attend = attention.attend
    return [(attention, "attend", lambda q, k, v, *rest: attend(q, k, v))]


def chunks_forget_those_before() -> list[Change]:
    read = Cache.read
    return [(Cache, "read", lambda self, layer, span: None if span.causal else read(self, layer, span))]


def end_tokens_from_config_json() -> list[Change]:
    from_file = GenerationConfig.from_file.__func__

    def two(cls: type, path: Any) -> GenerationConfig:
        config = ModelConfig.from_file(path.parent / "config.json")
        return replace(from_file(cls, path), eos_token_id=config.eos_token_id)

    return [(GenerationConfig, "from_file", classmethod(two))]


def answers_are_whole_canvases() -> list[Change]:
    settle = Request.settle

    def whole(self: Request, canvas: Canvas) -> Any:
        self.options = replace(self.options, max_new_tokens=-(-self.options.max_new_tokens // C) * C)
        return settle(self, canvas)

    return [(Request, "settle", whole)]


def last_canvas_is_cut_to_the_limit() -> list[Change]:
    begin = blocks.begin

    def short(model: Any, row: int, request: Request) -> Canvas:
        canvas = begin(model, row, request)
        if request.steps:
            kept = C - -canvas.options.max_new_tokens % C
            canvas.tokens = torch.cat((canvas.tokens[:kept], canvas.tokens.new_zeros(C - kept)))
        return canvas

    return [(blocks, "begin", short)]


def finished_counts_as_converged() -> list[Change]:
    settle = Request.settle
    return [(Request, "settle", lambda self, canvas: settle(self, replace(canvas, still=canvas.done)))]


def scores_of_a_prompt_in_one_piece() -> list[Change]:
    attend = attention.attend

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        with planted((attention, "SCORES_LIMIT", 1 << 60)):
            return attend(*args, **kwargs)

    return [(attention, "attend", whole)]


def a_mask_over_the_whole_prompt() -> list[Change]:
    attend = attention.attend

    def masked(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()
        return attend(q, k, *args, **kwargs)

    return [(attention, "attend", masked)]


def generation_writes_the_prompts_cache() -> list[Change]:
    return [(Cache, "fork", lambda self, rows=None: self)]


def forks_share_the_page_being_filled() -> list[Change]:
    def shallow(self: Cache, rows: Any = None) -> Cache:
        copy = Cache(self.config, len(self.rows), self.dtype, self.device)
        for mine, source in zip(copy.rows, self.rows, strict=True):
            mine.length, mine.pages = source.length, {kind: list(pages) for kind, pages in source.pages.items()}
        return copy

    return [(Cache, "fork", shallow)]


def grouped_experts_mix_up_their_weights() -> list[Change]:
    forward = Experts.forward

    def mixed(self: Experts, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return forward(self, x, weights.flatten()[experts.flatten().argsort()].view_as(weights), experts)

    return [(Experts, "forward", mixed)]


def grouped_experts_round_to_bfloat16() -> list[Change]:
    forward = Experts.forward

    def rounded(self: Experts, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return forward(self, x.to(torch.bfloat16).to(x.dtype), weights, experts)

    return [(Experts, "forward", rounded)]


TRAPS = [
    (history_includes_the_current_step, checks.a_row_stops_at_its_first_repetition),
    (history_includes_the_current_step, checks.trajectories_equal_the_reference),
    (accepts_on_the_whole_sum, checks.acceptance_is_the_references),
    (accepts_on_the_whole_sum, checks.trajectories_equal_the_reference),
    (acceptance_sticks, checks.trajectories_equal_the_reference),
    (temperature_by_steps_done, checks.temperatures_follow_the_steps_left),
    (temperature_by_steps_done, checks.trajectories_equal_the_reference),
    (temperature_reaches_t_min, checks.temperatures_follow_the_steps_left),
    (answers_with_the_noisy_canvas, checks.the_clean_canvas_is_committed),
    (commits_the_noisy_canvas, checks.the_clean_canvas_is_committed),
    (commits_the_proposal, checks.trajectories_equal_the_reference),
    (zero_logits_on_the_first_step, checks.self_conditioning_is_the_last_steps_and_of_this_block),
    (stale_self_conditioning_in_a_new_block, checks.self_conditioning_is_the_last_steps_and_of_this_block),
    (feeds_back_unscaled_logits, checks.self_conditioning_is_the_last_steps_and_of_this_block),
    (soft_cap_in_bfloat16, checks.the_cap_is_in_float32_and_before_the_temperature),
    (soft_cap_after_temperature, checks.the_cap_is_in_float32_and_before_the_temperature),
    (right_padding_is_attended, checks.rows_equal_the_same_rows_alone),
    (left_padding_is_attended, checks.rows_equal_the_same_rows_alone),
    (right_padding_leaves_a_gap_in_positions, checks.rows_equal_the_same_rows_alone),
    (rows_read_their_neighbours_prefix, checks.rows_equal_the_same_rows_alone),
    (prefix_is_stale_after_a_commit, checks.trajectories_equal_the_reference),
    (chunks_are_read_in_both_directions, checks.any_chunking_gives_the_same_cache),
    (chunks_forget_those_before, checks.any_chunking_gives_the_same_cache),
    (end_tokens_from_config_json, checks.all_three_end_tokens_are_known),
    (answers_are_whole_canvases, checks.a_limit_within_a_canvas_cuts_the_answer_only),
    (last_canvas_is_cut_to_the_limit, checks.a_limit_within_a_canvas_cuts_the_answer_only),
    (finished_counts_as_converged, checks.a_block_at_the_cap_is_not_called_converged),
    (scores_of_a_prompt_in_one_piece, checks.a_long_prompt_holds_few_scores),
    (a_mask_over_the_whole_prompt, checks.a_long_prompt_holds_few_scores),
    (generation_writes_the_prompts_cache, checks.a_prompts_cache_serves_many),
    (forks_share_the_page_being_filled, checks.a_prompts_cache_serves_many),
    (grouped_experts_mix_up_their_weights, checks.grouped_experts_equal_a_plain_loop),
    (grouped_experts_round_to_bfloat16, checks.grouped_experts_equal_a_plain_loop),
]
CHECKS = list(dict.fromkeys(check for _, check in TRAPS))


def run(check: Any, request: pytest.FixtureRequest) -> None:
    check(request.getfixturevalue("shared")) if check is checks.all_three_end_tokens_are_known else check()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ours(check, request):
    run(check, request)


@pytest.mark.parametrize(("trap", "check"), TRAPS, ids=lambda part: part.__name__)
def test_trap_is_noticed(trap, check, request):
    changes = trap()
    with planted(*changes), pytest.raises(AssertionError):
        run(check, request)


def test_the_release_has_three_end_tokens_and_its_config_two(shared):
    """What makes the trap a trap; the third ends a tool call."""
    assert ModelConfig.from_file(shared / "config.json").eos_token_id == (1, 106)
    assert GenerationConfig.from_file(shared / "generation_config.json").eos_token_id == (1, 106, 50)
