"""The conformance kit: two engines that are right, and every known mistake, planted, noticed and rightly named."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import test_traps
from decoding.checks import planted
from safetensors.torch import load_file

from dgemma.config import BOTH_WAYS, SLIDING, ModelConfig
from dgemma.conformance import case as files
from dgemma.conformance import make
from dgemma.conformance.adapter import Answer, Encoded, Request
from dgemma.conformance.case import DATA, Case, cases, first_difference
from dgemma.conformance.ours import Dgemma
from dgemma.conformance.plain import Plain
from dgemma.conformance.reference import Transformers
from dgemma.conformance.run import MASK, SCORES, Finding, check, suspects
from dgemma.conformance.traps import TRAPS
from dgemma.model import attention, layers, network
from dgemma.model.attention import Attention

CASES = {case.name: case for case in cases()}
GENERAL = ("many_rows", "ends_within_a_block", "self_conditioning", "global_layers", "pictures")
MEMORY = "prefill_masks_materialised"
PLANTED = {trap.__name__: trap for trap, _ in test_traps.TRAPS}


def some(*names: str) -> list[Case]:
    return [CASES[name] for name in dict.fromkeys((*names, *GENERAL))]


def wrong(findings: Sequence[Finding]) -> list[str]:
    return [f"{f.case.name}: {f.verdict} {f.place} {f.told}" for f in findings if f.verdict != "right"]


def named(findings: Sequence[Finding]) -> str:
    return suspects(findings)[0].trap


def test_ours_is_right():
    assert wrong(list(check(Dgemma(), list(CASES.values())))) == []


def test_the_reference_is_right_but_for_the_masks_that_it_makes():
    findings = list(check(Transformers(), list(CASES.values())))
    assert [f.case.name for f in findings if f.verdict != "right"] == [MEMORY]
    assert named(findings) == MASK


def test_every_trap_has_a_case_of_its_name():
    assert set(TRAPS) <= set(CASES)
    assert set(PLANTED) - {MASK, SCORES} <= set(TRAPS)


@pytest.mark.parametrize("name", sorted(set(PLANTED) - {MASK, SCORES}))
def test_a_mistake_in_our_code_is_noticed_and_named(name):
    """The mistakes of tests/decoding/test_traps.py, in code that shares nothing with what the cases were made by."""
    with planted(*PLANTED[name]()):
        findings = list(check(Dgemma(), some(name)))
    assert next(f for f in findings if f.case.name == name).verdict == "wrong"
    assert named(findings) == name


@pytest.mark.parametrize("name", [MASK, SCORES])
def test_memory_that_grows_with_the_square_of_a_prompt_is_noticed(name):
    # Ours takes prompts in chunks, which hide either mistake; without them and without mistakes it is right.
    whole = (network, "CHUNK", 1 << 30)
    with planted(whole):
        assert wrong(list(check(Dgemma(), [CASES[MEMORY]]))) == []
    with planted(whole, *PLANTED[name]()):
        (finding,) = check(Dgemma(), [CASES[MEMORY]])
    assert (finding.verdict, finding.looks_like) == ("wrong", (name,))


def swapped_scalars() -> list[Any]:
    """Both modes with the encoder's."""
    forward = network.Layer.forward

    def same(self: network.Layer, *args: Any) -> torch.Tensor:
        with planted((self, "layer_scalar", self.encoder_layer_scalar)):
            return forward(self, *args)

    return [(network.Layer, "forward", same)]


def rotated_values() -> list[Any]:
    keys_values = Attention.keys_values

    def tied(self: Attention, x: torch.Tensor, rope: Any) -> Any:
        k, v = keys_values(self, x, rope)
        return (k, v) if self.v_proj is not None else (k, layers.rms_norm(k, None, self.v_norm.eps))

    return [(Attention, "keys_values", tied)]


def bands() -> list[Any]:
    """Each position of a canvas with a window of its own."""
    attend = attention.attend

    def banded(q: Any, k: Any, v: Any, causal: bool = False, window: int | None = None, *rest: Any) -> Any:
        if causal or window is None:
            return attend(q, k, v, causal, window, *rest)
        first, share = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        at, key = torch.arange(first, k.shape[2])[:, None], torch.arange(k.shape[2])
        scores = q @ k.repeat_interleave(share, 1).mT
        scores = scores.masked_fill((key < first) & (key <= at - window), float("-inf"))
        return scores.softmax(-1) @ v.repeat_interleave(share, 1)

    return [(attention, "attend", banded)]


NETWORK = {
    "the_canvas_sees_a_band_of_the_prefix": bands(),
    "the_window_reaches_one_token_too_far": [(ModelConfig, "prefix_window", property(lambda c: c.sliding_window))],
    "values_are_the_rotated_keys": rotated_values(),
    "the_canvas_takes_the_encoders_scalars": swapped_scalars(),
}
PICTURES = {
    "pictures_are_read_causally": set(),
    "pictures_are_seen_both_ways_in_sliding_layers_only": {SLIDING},
}


@pytest.mark.parametrize("name", [*NETWORK, *PICTURES])
def test_a_mistake_in_the_network_is_noticed_and_named(name, monkeypatch):
    monkeypatch.setitem(BOTH_WAYS, "vision", PICTURES.get(name, BOTH_WAYS["vision"]))
    with planted(*NETWORK.get(name, ())):
        findings = list(check(Dgemma(), some(name)))
    assert next(f for f in findings if f.case.name == name).verdict == "wrong"
    assert named(findings) == name


@pytest.mark.parametrize("name", TRAPS)
def test_a_wrong_engine_fails_in_its_own_case(name):
    findings = list(check(TRAPS[name](), [CASES[name], CASES["self_conditioning"], CASES["pictures"]]))
    own = next(f for f in findings if f.case.name == name)
    assert own.verdict == "wrong"
    assert name in own.looks_like


class Reticent(Dgemma):
    """Shows only what it must: no keys, no values, no entropies, not what has converged."""

    def encode(self, *args: Any) -> list[Encoded]:
        return [Encoded(row.logits) for row in super().encode(*args)]

    def generate(self, requests: Sequence[Request], shared: int) -> list[Answer]:
        answers = super().generate(requests, shared)
        for answer in answers:
            answer.blocks = [replace(block, entropy=None, converged=None) for block in answer.blocks]
        return answers


@pytest.mark.parametrize(
    "name",
    [
        "temperature_reaches_t_min",
        "feeds_back_unscaled_logits",
        "stale_self_conditioning_in_a_new_block",
        "soft_cap_in_bfloat16",
        "accepts_on_the_whole_sum",
        "chunks_forget_those_before",
        "forks_share_the_page_being_filled",
        "left_padding_is_attended",
    ],
)
def test_an_engine_that_shows_little_is_told_as_much(name):
    assert wrong(list(check(Reticent(), some(name)))) == []
    with planted(*PLANTED[name]()):
        findings = list(check(Reticent(), some(name)))
    assert next(f for f in findings if f.case.name == name).verdict == "wrong"
    assert named(findings) == name


def test_two_mistakes_at_once_are_both_named():
    names = ["temperature_by_steps_done", "forks_share_the_page_being_filled"]
    with planted(*(change for name in names for change in PLANTED[name]())):
        findings = list(check(Dgemma(), some(*names)))
    assert {suspect.trap for suspect in suspects(findings)} == set(names)


class Shaken(Dgemma):
    """Every weight differs in the seventh digit."""

    def load(self, directory: Path) -> None:
        super().load(directory)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                tensor.mul_(1 + 3e-7 * torch.randn(tensor.shape, generator=generator))


def test_rounding_cannot_turn_a_decision():
    assert wrong(list(check(Shaken(), [case for case in CASES.values() if case.kind != "memory"]))) == []


@pytest.mark.parametrize("name", make.CHECKPOINTS)
def test_checkpoints_are_made_again_bit_for_bit(name, tmp_path):
    make.checkpoint(name, tmp_path)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / file).read_text() == (DATA / name / file).read_text()
    made, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path, DATA / name))
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[key], kept[key]) for key in made)


def test_golden_results_are_made_again():
    plain = Plain()
    for case in [*some("chunks_forget_those_before"), CASES["an_answer_about_a_picture"]]:
        plain.load(DATA / case.checkpoint)
        again = make.outcome(plain, case)
        assert list(again) == list(case.golden)
        for place, array in again.items():
            np.testing.assert_allclose(array, case.golden[place], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_all_files_are_made_again(tmp_path):
    make.main(tmp_path)
    names = sorted(path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file())
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()) == names
    for case in cases(tmp_path):
        assert first_difference(CASES[case.name].golden, case.golden) is None
        assert case.wrong.keys() == CASES[case.name].wrong.keys()
        assert case.prompts == CASES[case.name].prompts or case.prompts[0].pictures


def test_files_stay_small():
    sizes = {folder.name: sum(f.stat().st_size for f in folder.rglob("*")) for folder in DATA.iterdir()}
    assert max(sizes.values()) < 2_000_000
    assert sum(sizes.values()) < 3_000_000


def test_cases_of_another_version_are_refused(tmp_path):
    path = tmp_path / "many_rows.json"
    values = json.loads((DATA / "cases" / "many_rows.json").read_text())
    path.write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(ValueError, match="'dgemma-conformance' version 2, not 'dgemma-conformance' version 1"):
        files.read(path)


def test_how_values_differ_is_told():
    right = np.array([1.0, 2.0], np.float32)
    assert files.differing(right, np.array([1.0, np.nan], np.float32)) == "is off by inf at 1: nan for 2"
    assert files.differing(right, right + np.float32(2e-4)) == ""
    assert files.differing(right, right[:1]) == "has shape [1], not [2]"
    tokens = np.array([3, 4, 5], np.int32)
    assert files.differing(tokens, np.array([3, 9, 9], np.int32)) == "is 9 instead of 4 at 1, and 1 more"


ENGINE = """
import torch
from dgemma.conformance.ours import Dgemma
from dgemma.decoding import sampler

class Sound(Dgemma):
    pass

class Faulty(Dgemma):
    def generate(self, requests, shared):
        is_still = sampler.is_still
        sampler.is_still = lambda best, history, *rest: is_still(best, [*history, best], *rest)
        return super().generate(requests, shared)

class Broken(Dgemma):
    def encode(self, *asked):
        raise NotImplementedError("no canvas yet")

class Absent(Dgemma):
    def load(self, directory):
        raise MemoryError("no room")

class Short(Dgemma):
    def encode(self, *asked):
        rows = super().encode(*asked)
        for row in rows:
            row.logits = row.logits.tolist()[:-1]
        return rows

class Elsewhere(Dgemma):
    # As if it computed where torch sees nothing.
    def encode(self, prompts, canvas, previous, shared):
        return []

class Half:
    def load(self, directory): ...
"""


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    (folder / "engine.py").write_text(ENGINE)
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "100"}
    call = [sys.executable, "-m", "dgemma", "conformance", *options]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_checks_an_engine_of_ones_own(tmp_path):
    two = ["--case", "history_includes_the_current_step", "--case", "many_rows"]
    sound = command(tmp_path, "--adapter", "engine:Sound", *two)
    assert (sound.returncode, sound.stdout.splitlines()[-1]) == (0, "2 of 2 cases are right")
    faulty = command(tmp_path, "--adapter", "engine:Faulty", *two)
    assert faulty.returncode == 1
    lines = faulty.stdout.splitlines()
    assert lines[0].startswith("wrong   history_includes_the_current_step  row 0 block 0 ")
    assert "looks like history_includes_the_current_step: the stability test compares a step with itself" in lines[-1]
    told = json.loads(command(tmp_path, "--adapter", "engine:Faulty", "--json", *two).stdout)
    assert [f["verdict"] for f in told["findings"]] == ["wrong", "wrong"]
    assert told["suspects"][0]["explains"] == ["history_includes_the_current_step", "many_rows"]


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("Broken", "error global_layers NotImplementedError: no canvas yet"),
        ("Absent", "error global_layers MemoryError: no room"),
        ("Short", "wrong global_layers row 0 logits has shape [7, 48], not [8, 48]"),
        ("Elsewhere", "wrong global_layers row 0 logits is not there"),
    ],
)
def test_whatever_an_engine_does_is_a_finding(engine, told, tmp_path):
    found = command(tmp_path, "--adapter", f"engine:{engine}", "--case", "global_layers", "--case", MEMORY)
    assert found.returncode == 1
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert told in lines
    memory = next(line for line in lines if MEMORY in line)
    verdicts = {"Broken": "error", "Absent": "error", "Short": "right", "Elsewhere": "unseen"}
    assert memory.startswith(verdicts[engine])
    assert f"{int(engine == 'Short')} of 2 cases are right" in lines
    assert "like no mistake that is on record: global_layers" in lines[-1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--adapter", "engine"], "--adapter takes MODULE:CLASS, not 'engine'"),
        (["--adapter", "nowhere:Engine"], "--adapter nowhere:Engine: No module named 'nowhere'"),
        (["--adapter", "engine:Other"], "--adapter engine:Other: module 'engine' has no attribute 'Other'"),
        (["--adapter", "engine:Half"], "--adapter engine:Half has no encode()"),
        (["--case", "everything"], "there is no case 'everything'; there are acceptance_sticks, "),
    ],
)
def test_wrong_calls_are_told(options, why, tmp_path):
    found = command(tmp_path, *options)
    assert found.returncode == 2
    assert why in found.stderr
