"""Adapters as files: PEFT, on transformers' network, reads what we write and we read what it writes."""

import copy
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.reference import (
    distance,
    make_reference,
    our_logits,
    random_config,
    randomise,
    reference_causal_logits,
    reference_logits,
    reference_of,
    tokens,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgemma
from dgemma import embedded
from dgemma.checkpoints.adapters import load_adapter, save_adapter
from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig
from dgemma.model.lora import PARTS, Lora, adapter_state, add_lora, merge_lora
from dgemma.model.network import DiffusionGemma

SEEDS = range(6)
LIMIT = 1e-4
"""Largest difference in float32, as a share of the logits' scale."""
TWIN = "encoder.language_model"
needs_sudoku = pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")


@torch.no_grad()
def randomise_tensors(tensors: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        tensors[name].copy_(torch.randn(tensors[name].shape, generator=generator) * 0.15)


def adapted(seed: int, lora: Lora | None = None) -> DiffusionGemma:
    """Our network with random weights and a random adapter."""
    model = DiffusionGemma(random_config(random.Random(seed))).eval()
    randomise(model, seed)
    add_lora(model, lora or Lora(3, 5.0, tuple(PARTS)))
    randomise_tensors(adapter_state(model), seed)
    return model


def plain(model: DiffusionGemma) -> DiffusionGemma:
    """The base of an adapted network, without its adapter."""
    model = copy.deepcopy(model)
    for tensor in adapter_state(model).values():
        tensor.zero_()
    merge_lora(model)
    return model


@torch.no_grad()
def assert_equal_logits(ours: DiffusionGemma, theirs: Any, seed: int) -> None:
    """Both modes: causal logits, a canvas behind a prompt beyond the window, and one with self-conditioning."""
    config = ours.config
    prompt = tokens((2, 2 * config.sliding_window + 3), config.vocab_size, seed)
    canvas = tokens((2, config.canvas_length), config.vocab_size, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    previous = 4 * torch.randn(2, config.canvas_length, config.vocab_size, generator=generator)
    causal = ours.encode(prompt, ours.new_cache(2), logits=True)
    assert causal is not None
    assert distance(torch.stack(causal), reference_causal_logits(theirs, prompt)) < LIMIT
    for given in (None, previous):
        assert (
            distance(our_logits(ours, prompt, canvas, given), reference_logits(theirs, prompt, canvas, given)) < LIMIT
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_peft_reads_what_we_write(seed: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(seed)
    theirs = reference_of(plain(ours))
    before = {name for name, _ in theirs.named_modules() if "vision" in name}
    save_adapter(ours, tmp_path, "someone/model")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert_equal_logits(ours, theirs, seed)
    assert {name for name, _ in theirs.named_modules() if "vision" in name} == before
    held = {name.replace(".default", "") for name in wrapped.state_dict() if "lora_" in name}
    assert held == set(load_file(tmp_path / "adapter_model.safetensors"))
    assert wrapped.peft_config["default"].base_model_name_or_path == "someone/model"
    assert not [w for w in recwarn if "missing" in str(w.message) or "matched" in str(w.message)]


def peft_model(theirs: Any, seed: int, **options: Any) -> Any:
    """transformers' network under a random adapter of PEFT's own, the same in encoder and decoder."""
    peft = pytest.importorskip("peft")
    config = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": r"model\.(encoder\.language_model|decoder)\..*(self_attn|mlp|self_conditioning)\.\w+_proj",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**config | options)).eval()
    state = {name: tensor for name, tensor in wrapped.state_dict().items() if "lora_" in name}
    randomise_tensors({name: tensor for name, tensor in state.items() if TWIN not in name}, seed)
    with torch.no_grad():
        for name in [name for name in state if TWIN in name and name.replace(TWIN, "decoder") in state]:
            state[name].copy_(state[name.replace(TWIN, "decoder")])
    return wrapped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision.*"},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ],
    ids=["all", "rslora", "two-modules", "one-parameter"],
)
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_we_read_what_peft_writes(seed: int, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = make_reference(random_config(random.Random(seed)), seed)
    base = copy.deepcopy(ours)
    peft_model(theirs, seed, **options).save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_equal_logits(ours, theirs, seed)
    prompt, canvas = tokens((1, 5), ours.config.vocab_size, 0), tokens((1, 4), ours.config.vocab_size, 1)
    assert distance(our_logits(base, prompt, canvas), our_logits(ours, prompt, canvas)) > 0.05
    merge_lora(ours)
    assert_equal_logits(ours, theirs, seed)


@pytest.mark.parametrize("kept", ["decoder", TWIN])
def test_one_copy_is_enough(kept: str, tmp_path: Path) -> None:
    ours = adapted(1, Lora(2, 3.0, ("attention", "experts")))
    save_adapter(ours, tmp_path, "base")
    edit_tensors(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if f"model.{kept}." in name})
    again = plain(ours)
    load_adapter(again, tmp_path)
    assert_same(adapter_state(again), adapter_state(ours))


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    save_adapter(adapted(1), tmp_path, "base")
    key = f"base_model.model.model.{TWIN}.layers.0.mlp.up_proj.lora_B.weight"
    edit_tensors(tmp_path, lambda tensors: tensors | {key: tensors[key] + 1e-3})
    twin = key.replace(TWIN, "decoder")
    with pytest.raises(ValueError, match=re.escape(f"{twin} differs from {key}")):
        load_adapter(plain(adapted(1)), tmp_path)


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours = adapted(2).to(dtype)
        save_adapter(ours, tmp_path, "base")
        again = plain(ours)
        load_adapter(again, tmp_path)
        assert_same(adapter_state(again), adapter_state(ours))
        prompt, canvas = tokens((1, 5), ours.config.vocab_size, 0), tokens((1, 4), ours.config.vocab_size, 1)
        assert torch.equal(our_logits(again, prompt, canvas), our_logits(ours, prompt, canvas))
        assert {p.requires_grad for p in again.parameters()} == {True, False}


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_transformers_reads_the_merged_model(seed: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = adapted(seed)
    merged = copy.deepcopy(ours)
    merge_lora(merged)
    save_model(merged, tmp_path, GenerationConfig())
    # It has no network without an image tower: the reference's has one of its own.
    config = reference_of(merged).config
    kind = transformers.DiffusionGemmaForBlockDiffusion
    theirs, info = kind.from_pretrained(tmp_path, config=config, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all("vision" in name for name in info["missing_keys"])
    theirs.set_experts_implementation("eager")
    assert_equal_logits(ours, theirs.eval(), seed)


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Q = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
EXPERTS = "base_model.model.model.decoder.layers.0.experts"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t | {Q.replace("q_proj", "p_proj") + ".lora_A.weight": torch.ones(3, 3)},
            r"unknown: 1 .*\.p_proj\.",
        ),
        (lambda t: t | {Q + ".base_layer.lora_A.weight": torch.ones(3, 3)}, r"unknown: 1 .*q_proj\.base_layer\."),
        (lambda t: t | {Q + ".lora_magnitude_vector": torch.ones(3)}, "unknown: 1 .*lora_magnitude_vector"),
        (lambda t: t | {"lm_head.lora_A.weight": torch.ones(3, 3)}, r"unknown: 1 .*lm_head\.lora_A"),
        (
            lambda t: t | {"base_model.model.model.encoder.vision_tower.q_proj.lora_A.weight": torch.ones(3, 3)},
            "unknown: 1 .*vision_tower",
        ),
        (
            lambda t: only(t, Q) | {Q + ".lora_B.weight": torch.ones(5, 3)},
            r"wrongly shaped for rank 3: 1 .*q_proj.*\[5, 3\]",
        ),
        (
            lambda t: only(t, Q) | {Q + ".lora_A.weight": torch.ones(4, 24)},
            r"wrongly shaped for rank 3: 1 .*q_proj.*\[4, 24\]",
        ),
        (
            lambda t: only(t, EXPERTS) | {EXPERTS + ".lora_B.weight": torch.ones(5, 3)},
            "wrongly shaped for rank 3: 1 .*experts",
        ),
        (lambda t: only(t, Q + ".lora_A"), r"without its other half: 1 .*q_proj\.lora_A"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit: Edit, message: str, tmp_path: Path) -> None:
    ours = adapted(1)
    save_adapter(ours, tmp_path, "base")
    edit_tensors(tmp_path, edit)
    model = plain(ours)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("r", 0),
        ("r", None),
        ("lora_alpha", "much"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(field: str, value: Any, tmp_path: Path, edit_json: Any) -> None:
    ours = adapted(0)
    save_adapter(ours, tmp_path, "base")
    edit_json(tmp_path / "adapter_config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*\b{field} .*{re.escape(repr(value))}"):
        load_adapter(plain(ours), tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    ours = adapted(0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        save_adapter(ours, tmp_path, "base")
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no {re.escape(name)}"):
            load_adapter(plain(ours), tmp_path)
    save_adapter(ours, tmp_path, "base")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(plain(ours), tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(plain(ours), tmp_path, "base")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted(0), tmp_path, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dgemma.checkpoints.adapters.write_json", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(adapted(1), tmp_path, "base")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def on_sudoku(tmp_path: Path) -> tuple[Path, DiffusionGemma]:
    """The directory of a random adapter on the embedded model, and that model with it."""
    model = dgemma.load("sudoku").model
    add_lora(model, Lora(2, 2.0))
    randomise_tensors(adapter_state(model), 0)
    save_adapter(model, tmp_path / "adapter", "sudoku")
    return tmp_path / "adapter", model


@needs_sudoku
@pytest.mark.parametrize("base", ["sudoku", "./copy"])
def test_load_merges_an_adapter_into_its_base(base: str, on_sudoku: Any, monkeypatch: Any, edit_json: Any) -> None:
    directory, model = on_sudoku
    monkeypatch.chdir(directory.parent)
    home = embedded.directory("sudoku")
    assert home is not None
    shutil.copytree(home, "copy")
    edit_json(directory / "adapter_config.json", base_model_name_or_path=base)
    lm = dgemma.load("adapter")
    assert (lm.name, lm.task) == ("adapter", None)
    assert lm.defaults == dgemma.load("sudoku").defaults
    assert lm.template is not None
    prompt = tokens((1, 9), model.config.vocab_size, 0)
    canvas = tokens((1, model.config.canvas_length), model.config.vocab_size, 1)
    assert distance(our_logits(lm.model, prompt, canvas), our_logits(model, prompt, canvas)) < LIMIT
    assert list(lm.model.state_dict()) == list(dgemma.load("sudoku").model.state_dict())
    assert not any(p.requires_grad for p in lm.model.parameters())
    # The base is memory-mapped: merging must not reach its file.
    assert (Path("copy") / "model.safetensors").read_bytes() == (home / "model.safetensors").read_bytes()


@needs_sudoku
def test_an_adapter_may_bring_its_own_template(on_sudoku: Any) -> None:
    directory, _ = on_sudoku
    (directory / "chat_template.jinja").write_text("mine: {{ messages[0].content }}")
    lm = dgemma.load(directory)
    assert lm.render([{"role": "user", "content": "x"}]) == "mine: x"


def test_a_base_that_is_not_to_be_had(tmp_path: Path, edit_json: Any) -> None:
    save_adapter(adapted(0), tmp_path, "./nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json changes './nowhere', .* no directory nowhere"):
        dgemma.load(tmp_path)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="lacks base_model_name_or_path"):
        dgemma.load(tmp_path)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        dgemma.load(tmp_path)


def only(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(start)}


def edit_tensors(directory: Path, edit: Edit) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
