"""Prompts with pictures against the reference: logits, whole trajectories, and every way to cut a prompt."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from parity.reference import distance, make_reference, random_config, tokens, transformers
from parity.trajectory import CONFIG, OPTIONS, calm, noises, our_trajectories, reference_trajectories
from parity.vision import inputs, make_pair, picture, prompt_of, with_tower
from torch import Tensor

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model import network
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Placed, pieces, within

LIMIT = 3e-4
"""Largest difference in float32, as a share of the logits' root mean square."""
SEEDS = range(12)
PATCHES = 30


@cache
def pair(seed: int) -> tuple[DiffusionGemma, Any]:
    rng = random.Random(seed)
    return make_pair(with_tower(random_config(rng), rng), seed)


def in_mode(ours: DiffusionGemma, mode: str | None) -> DiffusionGemma:
    other = DiffusionGemma(replace(ours.config, use_bidirectional_attention=mode)).eval()
    other.load_state_dict(ours.state_dict())
    return other


def prompt(config: ModelConfig, seed: int) -> tuple[Tensor, list[Placed]]:
    """Pictures within the window and beyond it, first, last, side by side and alone, with and without text before."""
    rng = random.Random(seed)
    text = lambda: tokens((rng.randint(1, 7),), config.vocab_size - 1, rng.randrange(999)).tolist()  # noqa: E731
    shown = [picture(config, rng.randint(1, 4), rng.randint(1, 6), rng.randrange(999)) for _ in range(3)]
    parts = [text(), shown[0], text(), shown[1], text(), shown[2], text()]
    return prompt_of(parts[seed % 2 : 7 - seed % 3 // 2], config)


def masks(theirs: Any, prompt: Tensor, cache: Any, mode: str | None) -> dict[str, Tensor]:
    """The causal masks that the reference's `generate` makes, or Gemma 4's, or those without regard to pictures."""
    seen = (prompt == theirs.config.image_token_id).long()
    embedded = torch.empty(*prompt.shape, 0)
    positions = torch.arange(prompt.shape[1])[None]
    common = {"inputs_embeds": embedded, "attention_mask": None, "past_key_values": cache, "position_ids": positions}
    if mode == "vision_sliding":
        from transformers.models.gemma4 import modeling_gemma4 as gemma4

        blocks = gemma4.get_block_sequence_ids_for_mask(seen, prompt.device)
        config = theirs.config.get_text_config()
        return gemma4.create_masks_for_vision_model(config, **common, block_sequence_ids=blocks)
    make = theirs.model.encoder.create_masks_for_generate
    return make(config=theirs.config, **common, mm_token_type_ids=seen if mode else None)


@torch.no_grad()
def reference_logits(theirs: Any, prompt: Tensor, placed: list[Placed], canvas: Tensor, mode: str | None) -> Tensor:
    cache = transformers.DynamicCache(config=theirs.config.get_text_config(decoder=True))
    mapping = masks(theirs, prompt[None], cache, mode)
    shown = inputs([each.picture for each in placed], padded_size(placed))
    theirs.model.encoder(input_ids=prompt[None], past_key_values=cache, attention_mask=mapping, **shown)
    return theirs(decoder_input_ids=canvas, past_key_values=cache).logits


def padded_size(placed: list[Placed]) -> int:
    return max(len(each.picture.patches) for each in placed) + 36


@torch.no_grad()
def our_logits(ours: DiffusionGemma, prompt: Tensor, placed: list[Placed], canvas: Tensor, at: int = 0) -> Tensor:
    """`at`: where the prompt is cut in two calls."""
    cache = ours.new_cache()
    for begin, end in ((0, at), (at, len(prompt))):
        ours.encode([prompt[begin:end]], cache, pictures=[within(placed, begin, end)])
    return ours.denoise(canvas, cache)


@pytest.mark.parametrize("mode", ["vision", "vision_sliding", None])
@pytest.mark.parametrize("seed", SEEDS)
def test_logits(seed, mode):
    ours, theirs = pair(seed)
    asked, placed = prompt(ours.config, seed)
    canvas = tokens((1, ours.config.canvas_length), ours.config.vocab_size, seed)
    reference = reference_logits(theirs, asked, placed, canvas, mode)
    assert distance(our_logits(in_mode(ours, mode), asked, placed, canvas), reference) <= LIMIT


@pytest.mark.parametrize("mode", ["vision", "vision_sliding", None])
def test_the_config_names_the_mode(mode):
    ours, _ = pair(0)
    config = replace(ours.config, use_bidirectional_attention=mode)
    values = config.to_dict()
    assert values["text_config"]["use_bidirectional_attention"] == mode
    assert ModelConfig.from_dict(values) == config
    del values["text_config"]["use_bidirectional_attention"]
    assert ModelConfig.from_dict(values).use_bidirectional_attention is None, "as the reference takes it"
    values["text_config"]["use_bidirectional_attention"] = "all"
    with pytest.raises(ValueError, match="use_bidirectional_attention cannot be 'all', only 'vision'"):
        ModelConfig.from_dict(values)


def test_the_modes_differ():
    """What a comparison of one mode could be blind to. The last layer's keys alone are no witness."""
    kinds = set()
    for seed in SEEDS:
        ours, _ = pair(seed)
        asked, placed = prompt(ours.config, seed)
        canvas = tokens((1, ours.config.canvas_length), ours.config.vocab_size, seed)
        found = [our_logits(in_mode(ours, mode), asked, placed, canvas) for mode in ("vision", "vision_sliding", None)]
        kinds |= {(i, j) for i in range(3) for j in range(i) if distance(found[i], found[j]) > 10 * LIMIT}
    assert kinds == {(1, 0), (2, 0), (2, 1)}


def test_the_prompts_are_varied():
    longest = [max(each.end - each.begin for each in prompt(pair(seed)[0].config, seed)[1]) for seed in SEEDS]
    windows = [pair(seed)[0].config.sliding_window for seed in SEEDS if SLIDING in pair(seed)[0].config.layer_types]
    assert any(a > b for a, b in zip(longest, windows, strict=False))
    placed = [(prompt(pair(seed)[0].config, seed), pair(seed)[0].config.canvas_length) for seed in SEEDS]
    assert any(each.begin // page != (each.end - 1) // page for (_, some), page in placed for each in some)
    assert any(some[0].begin == 0 for (_, some), _ in placed)
    assert any(some[-1].end == len(asked) for (asked, some), _ in placed)


@pytest.mark.parametrize("seed", SEEDS)
def test_where_a_prompt_is_cut_does_not_matter(seed, monkeypatch):
    """Between calls, at a picture's edges and in its middle; and within a call, at any chunk's end."""
    ours, _ = pair(seed)
    asked, placed = prompt(ours.config, seed)
    canvas = tokens((1, ours.config.canvas_length), ours.config.vocab_size, seed)
    whole = our_logits(ours, asked, placed, canvas)
    for size in (1, 3, 8):
        monkeypatch.setattr(network, "CHUNK", size)
        assert distance(our_logits(ours, asked, placed, canvas), whole) <= LIMIT
    edges = {edge for each in placed for edge in (each.begin, each.end)}
    for at in sorted(edges | {1, len(asked) - 1}):
        if not any(each.begin < at < each.end for each in placed):
            assert distance(our_logits(ours, asked, placed, canvas, at), whole) <= LIMIT


@torch.no_grad()
def test_a_prompt_goes_on_from_pages_that_end_within_a_picture():
    inside = 0
    for seed in SEEDS:
        ours, _ = pair(seed)
        page, window = ours.config.canvas_length, ours.config.prefix_window
        asked, placed = prompt(ours.config, seed)
        canvas = tokens((1, page), ours.config.vocab_size, seed)
        cache = ours.new_cache()
        kept: dict[str, dict[int, Tensor]] = {SLIDING: {}, FULL: {}}
        for begin, end in pieces(len(asked), placed, 1):
            ours.encode([asked[begin:end]], cache, pictures=[within(placed, begin, end)])
            for kind, held in cache.rows[0].pages.items():
                kept[kind] |= {i: each for i, each in enumerate(held) if each is not None}
        whole = ours.denoise(canvas, cache)
        for at in range(page, len(asked), page):
            cut = [at - each.begin for each in placed if each.begin < at < each.end]
            first = ours.config.first_reached(SLIDING, at) // page
            if any(length > window for length in cut) or any(i not in kept[SLIDING] for i in range(first, at // page)):
                continue
            begun = ours.new_cache()
            begun.rows[0].length = at
            begun.rows[0].pages = {kind: [held.get(i) for i in range(at // page)] for kind, held in kept.items()}
            ours.encode([asked[at:]], begun, pictures=[within(placed, at, len(asked))])
            assert distance(ours.denoise(canvas, begun), whole) <= LIMIT
            inside += len(cut)
    assert inside > 10


def test_rows_of_a_batch_do_not_see_each_other():
    ours, _ = pair(5)
    prompts = [prompt(ours.config, seed) for seed in (5, 8, 5)]
    canvas = tokens((3, ours.config.canvas_length), ours.config.vocab_size, 1)
    cache = ours.new_cache(3)
    with torch.no_grad():
        ours.encode([asked for asked, _ in prompts], cache, pictures=[placed for _, placed in prompts])
        together = ours.denoise(canvas, cache)
    for row, (asked, placed) in enumerate(prompts):
        assert distance(together[row], our_logits(ours, asked, placed, canvas[row : row + 1])[0]) <= LIMIT


def test_equal_pictures_are_encoded_once():
    ours, _ = pair(0)
    same, other = picture(ours.config, 2, 2, 1), picture(ours.config, 2, 2, 2)
    again = picture(ours.config, 2, 2, 1)
    assert same is not again
    counted = []
    hook = ours.vision.patch_embedder.register_forward_hook(lambda module, given, out: counted.append(len(out)))
    with torch.no_grad():
        found = ours.see([same, other, again])
    hook.remove()
    assert sum(counted) == len(same.patches) + len(other.patches)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_misplaced_pictures_are_told():
    ours, _ = pair(0)
    shown = picture(ours.config, 2, 2, 1)
    text = torch.zeros(9, dtype=torch.int64)
    for placed, why in (
        ([Placed(shown, 0, 3)], "4 soft tokens stands for 3"),
        ([Placed(shown, 6, 10)], "does not lie within"),
        ([Placed(shown, 0, 4), Placed(shown, 2, 6)], "does not lie within 4"),
        ([Placed(shown, -1, 3)], "does not lie within 0"),
    ):
        with pytest.raises(ValueError, match=why):
            ours.encode([text], ours.new_cache(), pictures=[placed])
    with pytest.raises(ValueError, match="no vision tower"):
        DiffusionGemma(CONFIG).encode([text], DiffusionGemma(CONFIG).new_cache(), pictures=[[Placed(shown, 0, 4)]])
    large = picture(ours.config, 2, 30, 1)
    with pytest.raises(ValueError, match="the tower has 40 positions"):
        ours.see([large])


@cache
def talkers() -> tuple[DiffusionGemma, Any]:
    rng = random.Random(4)
    config = with_tower(CONFIG, rng, pooling_kernel_size=2)
    return make_reference(config, 7, calm)


@pytest.mark.parametrize("seed", range(12))
def test_trajectories_are_identical_to_the_reference(seed):
    ours, theirs = talkers()
    asked, placed = prompt(ours.config, seed)
    noise = noises(seed, 1)
    (mine,) = our_trajectories(ours, [asked], OPTIONS, noise, [placed])
    shown = inputs([each.picture for each in placed], padded_size(placed))
    kinds = (asked == ours.config.image_token_id).long()[None]
    (reference,) = reference_trajectories(theirs, asked[None], OPTIONS, noise, mm_token_type_ids=kinds, **shown)
    assert mine.blocks == reference.blocks
    assert mine.tokens == reference.tokens
    (blind,) = our_trajectories(ours, [asked], OPTIONS, noise)
    assert blind.blocks != mine.blocks, "the pictures change nothing: the test is blind"
