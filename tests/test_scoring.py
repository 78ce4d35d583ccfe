"""Choices at marked places, held against the network's own logits; and answers ranked by the causal mode."""

import math

import pytest
import torch

import dgemma
from dgemma.decoding import sampler
from dgemma.decoding.vocabulary import NEVER
from dgemma.language_model import LanguageModel
from dgemma.scoring import PLACE, Question

ASKED = "Is the sea warm?"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return dgemma.load("tiny", "cpu", "float32")


@torch.inference_mode()
def logits_after(lm: LanguageModel, prompt: list[int], pins: dict[int, int], steps: int, seed: int) -> torch.Tensor:
    """The last step's logits [C, V] of the whole vocabulary, by the reference's formulas."""
    model, noise, options = lm.model, lm.noise(seed), lm.defaults.with_options(max_denoising_steps=steps)
    cache = model.new_cache()
    model.encode([torch.tensor(prompt)], cache)
    places, tokens = torch.tensor(list(pins)), torch.tensor(list(pins.values()))
    canvas, previous = noise.canvas(0), None
    canvas[places] = tokens
    for step in range(1, steps + 1):
        logits = model.denoise(canvas[None], cache, previous)[0]
        if step == steps:
            return logits
        beliefs = logits / options.temperature(steps + 1 - step)
        for end in options.eos_token_id:  # none can stand before the last pin
            beliefs[: max(pins) + 1, end] = NEVER
        p = beliefs.softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        entropy[places] = math.inf
        accepted = sampler.accept(entropy[None], torch.tensor([options.entropy_bound]))[0]
        proposal = (p.double().cumsum(-1) > noise.uniform(0, step)[:, None]).int().argmax(-1)
        canvas = torch.where(accepted, proposal, noise.renoise(0, step))
        canvas[places] = tokens
        beliefs[places] = NEVER
        beliefs[places, tokens] = 0
        previous = beliefs[None]
    raise AssertionError


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("choices", [["yes", "no", "q"], ["It", "cold"]])
def test_scores_are_the_softmax_of_the_last_logits(lm: LanguageModel, steps: int, choices: list[str]) -> None:
    encode = lm.tokenizer.encode
    scores = lm.score(ASKED, f"I say {PLACE}, yes, {PLACE}.", choices, steps, seed=7)
    before, between, after = encode("I say "), encode(", yes, "), encode(".")
    products = []
    for choice in choices:
        tokens = encode(choice)
        whole = [*before, *[None] * len(tokens), *between, *[None] * len(tokens), *after]
        pins = {place: token for place, token in enumerate(whole) if token is not None}
        p = logits_after(lm, lm.tokens(ASKED), pins, steps, 7).double().softmax(-1)
        free = [place for place, token in enumerate(whole) if token is None]
        products.append(math.prod(float(p[place, token]) for place, token in zip(free, tokens * 2, strict=True)))
    assert scores.mass == pytest.approx(sum(products), rel=2e-3)
    assert scores.probabilities == pytest.approx([p / sum(products) for p in products], abs=1e-3)
    assert sum(scores.probabilities) == pytest.approx(1, abs=1e-12)
    assert scores.best == choices[products.index(max(products))]


def test_the_whole_vocabulary_has_a_mass_of_one(lm: LanguageModel) -> None:
    singles = [t for i in range(len(lm.tokenizer)) if lm.tokenizer.encode(t := lm.tokenizer.decode([i])) == [i]]
    assert 0 < lm.score(ASKED, PLACE, singles).mass <= 1
    several = lm.score(ASKED, PLACE, [*singles, "yes and no"])
    assert several.mass == pytest.approx(
        lm.score(ASKED, PLACE, singles).mass + lm.score(ASKED, PLACE, ["yes and no"]).mass
    )


def test_questions_share_batches_and_change_nothing_in_one_another(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [
        Question(prompt, template, ["yes", "no", "neither"])
        for prompt in (ASKED, [5, 6, 7], "What is a cat?")
        for template in (f"{PLACE}.", f"So: {PLACE}")
    ]
    alone = [lm.score(q.prompt, q.template, q.choices, 2) for q in questions]
    rows: list[int] = []
    denoise = type(lm.model).denoise_states

    def counted(model: object, canvas: torch.Tensor, *others: object) -> torch.Tensor:
        rows.append(len(canvas))
        return denoise(model, canvas, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lm.model), "denoise_states", counted)
    together = lm.score_all(questions, 2)
    lengths = len({len(lm.tokenizer.encode(choice)) for choice in questions[0].choices})
    assert rows == [6 * lengths] * 2
    for one, other in zip(alone, together, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
        assert one.mass == pytest.approx(other.mass, rel=1e-3)
    assert lm.score_all([]) == []


@pytest.mark.parametrize(
    ("template", "choices", "steps", "said"),
    [
        ("none", ["a"], 1, f"template: {PLACE} must stand"),
        (PLACE, [], 1, "choices: there is nothing"),
        (PLACE, ["a", "a"], 1, "choices: one of them stands there twice"),
        (PLACE, ["a", ""], 1, "choices: one of them is empty"),
        (PLACE, ["a"], 0, "steps must be at least 1, not 0"),
        ("word " * 300 + PLACE, ["a"], 1, "a canvas holds 96"),
    ],
)
def test_what_cannot_be_asked(lm: LanguageModel, template: str, choices: list[str], steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lm.score(ASKED, template, choices, steps)
    with pytest.raises(ValueError, match="prompt is empty"):
        lm.score([], PLACE, ["a"])


def test_the_best_of_several_is_the_likeliest_of_their_single_answers(lm: LanguageModel) -> None:
    options = {"max_denoising_steps": 4, "max_new_tokens": 120}
    best = lm.generate(ASKED, seed=2**64 - 1, best_of=3, **options)
    single = {seed: lm.generate(ASKED, seed=seed, **options) for seed in (2**64 - 1, 0, 1)}
    means = {}
    for seed, answer in single.items():
        logs = lm.log_probabilities(ASKED, answer.tokens)
        means[seed] = sum(logs) / len(logs)
    order = sorted(means, key=lambda seed: -means[seed])
    assert [c.seed for c in best.candidates] == order
    assert [c.tokens for c in best.candidates] == [single[seed].tokens for seed in order]
    assert [c.log_probability for c in best.candidates] == pytest.approx([means[seed] for seed in order], abs=1e-4)
    assert (best.seed, best.tokens) == (order[0], single[order[0]].tokens)
    assert best.prompt_tokens == single[0].prompt_tokens
    with pytest.raises(ValueError, match="best_of must be at least 1, not 0"):
        lm.generate(ASKED, best_of=0)
