"""LoRA beside quantised weights: the gradients of the weights they mean, and runs that leave the base as it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dgemma
from dgemma.checkpoints.load import load_model
from dgemma.cli import app, merge
from dgemma.model.lora import Lora, adapter_state, add_lora, pairs
from dgemma.model.network import DiffusionGemma
from dgemma.quant.modules import matrices
from dgemma.train import run as module
from dgemma.train.options import Recipe, TrainOptions
from dgemma.train.run import run

SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "canvas_length": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_global_key_value_heads": 2}
SIZES = {
    **SMALL,
    **HEADS,
    "global_head_dim": 32,
    "num_experts": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
OPTIONS = TrainOptions(steps=20, batch=2, learning_rate=0.02, warmup=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the chat format, of random weights but for two steps."""
    recipe = Recipe("tiny", {"prose:facts": 1.0}, scratch=True, config=SIZES, options=TrainOptions(steps=2, batch=2))
    return run(recipe, tmp_path_factory.mktemp("base"), "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = (json.dumps({"prompt": f"Say {n}.", "response": f"{n} it is."}) for n in range(20))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def recipe(base: Path, data: str) -> Callable[..., Recipe]:
    def make(quantize: str | None = "int4", **options: object) -> Recipe:
        lora = {"rank": 4, "alpha": 8.0}
        made = Recipe(str(base), {data: 1.0}, lora=lora, quantize=quantize, options=OPTIONS)
        return made.with_options(**options)

    return make


def losses(directory: Path) -> list[float]:
    return [e["loss"] for e in map(json.loads, (directory / "log.jsonl").read_text().splitlines()) if "loss" in e]


def dequantised(model: DiffusionGemma) -> DiffusionGemma:
    """The plain network of the weights that the packed ones mean."""
    plain = DiffusionGemma(model.config).eval()
    own, packed = model.state_dict(), matrices(model)
    plain.load_state_dict({n: packed[n].dense() if n in packed else own[n] for n in plain.state_dict()})
    return plain


def gradients(model: DiffusionGemma) -> dict[str, torch.Tensor]:
    """Of random adapters in every part, by a loss of both modes."""
    add_lora(model, Lora(3, 6.0, ("attention", "mlp", "experts", "self_conditioning", "router")))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
    tokens = torch.randint(20, 300, (2, 24), generator=generator)
    cache = model.new_cache(2)
    causal = model.encode(tokens, cache, logits=True)
    previous = torch.randn(2, 16, model.config.vocab_size, generator=generator)
    canvas = model.denoise(tokens[:, :16], cache, previous)
    assert causal is not None
    (torch.stack(causal).square().mean() + canvas.square().mean()).backward()
    return {f"{n}.{k}": p.grad for n, pair in pairs(model).items() for k, p in pair.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "fp8"])
def test_gradients_are_those_beside_the_weights_that_are_meant(base: Path, kind: str) -> None:
    model = load_model(base, "cpu", "float32", kind)
    theirs = gradients(dequantised(model))
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    assert sum("experts" in name for name in ours) == 8  # A and B of two stacks in two layers
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm(), name  # sums are in another order
    flat, wanted = (torch.cat([found[name].flatten() for name in theirs]) for found in (ours, theirs))
    assert (flat - wanted).norm() < 2e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["int8", "int4", "nvfp4"])
def test_a_run_learns_beside_the_base(
    recipe: Callable[..., Recipe], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[DiffusionGemma] = []
    begin = module.Run
    monkeypatch.setattr(module, "Run", lambda model, *rest: trained.append(model) or begin(model, *rest))
    asked = recipe(kind)
    assert run(asked, tmp_path, "cpu") == tmp_path / "adapter"
    first, last = losses(tmp_path)  # means of ten steps
    assert last < first - 0.1

    fresh = load_model(asked.model, "cpu", trained[0].dtype, kind)
    inside, untouched = matrices(trained[0]), matrices(fresh)
    assert len(inside) == len(untouched) == 17
    for packed, before in zip(inside.values(), untouched.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(packed.buffers(), before.buffers(), strict=True))
    own = {id(p) for pair in pairs(trained[0]).values() for p in pair.parameters()}
    held = [t for t in (*trained[0].parameters(), *trained[0].buffers()) if id(t) not in own]
    assert sum(t.nbytes for t in held) == sum(t.nbytes for t in fresh.state_dict().values())
    assert not any(t.requires_grad for t in held)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["weights"]) == len(own)
    assert set(state["recipe"]) >= {"quantize"}


def test_an_adapter_loads_on_the_quantised_base_and_the_plain_one(
    recipe: Callable[..., Recipe], base: Path, tmp_path: Path
) -> None:
    adapter = run(recipe(steps=2), tmp_path / "run", "cpu")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["weights"]
    beside = dgemma.load(adapter, "cpu", quantize="int4")
    assert matrices(beside.model)
    assert beside.generate("Say 3.", max_new_tokens=16).tokens
    assert not any(p.requires_grad for p in beside.model.parameters())
    kept = adapter_state(beside.model)
    assert len(kept) == len(state)
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())

    merged, plain = dgemma.load(adapter, "cpu").model, load_model(base, "cpu").state_dict()
    assert not pairs(merged)
    for name, tensor in merged.state_dict().items():
        a, b = state.get(f"{name}.A"), state.get(f"{name}.B")
        update = 0 if a is None or b is None else 2.0 * (b @ a)
        torch.testing.assert_close(tensor, plain[name] + update, rtol=1e-5, atol=1e-6)
    merge(str(adapter), tmp_path / "merged")
    written = load_model(tmp_path / "merged", "cpu").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in merged.state_dict().items())


def test_a_resumed_run_is_the_same_bit_for_bit(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = recipe("nvfp4", steps=4, ema=0.9, optimizer="muon")
    run(whole, tmp_path / "whole", "cpu")
    keep = module.train

    def stop_at_two(going, *rest, **options):  # type: ignore[no-untyped-def]
        keep(going, *rest[:5], lambda: going.step >= 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            run(whole.with_options(checkpointing=True), tmp_path / "parts", "cpu")
    run(whole, tmp_path / "parts", "cpu")
    first, second = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert first["step"] == second["step"] == 4
    for part in ("weights", "average"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], tensor) for name, tensor in second[part].items())
    assert first["average"].keys() == first["weights"].keys()
    with pytest.raises(ValueError, match="holds a run with quantize = 'nvfp4', not 'fp8'"):
        run(replace(whole, quantize="fp8"), tmp_path / "parts", "cpu")


def test_what_is_quantised_already_is_a_base_too(recipe: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(base), "--format", "fp8", "--out", str(tmp_path / "fp8")])
    assert done.exit_code == 0, done.output
    plan = replace(recipe(None, steps=2), model=str(tmp_path / "fp8"))
    with pytest.raises(ValueError, match="quantised weights cannot train: with lora"):
        run(replace(plan, lora=None), tmp_path / "all", "cpu")
    adapter = run(plan, tmp_path / "run", "cpu")
    lm = dgemma.load(adapter, "cpu")
    assert {matrix.kind for matrix in matrices(lm.model).values()} == {"fp8"}
    assert adapter_state(lm.model)
    with pytest.raises(ValueError, match=r"is quantised: an adapter cannot be merged into it; load the model unquant"):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="is an adapter on quantised weights: `dgemma merge` it with plain ones first"):
        run(replace(plan, model=str(adapter)), tmp_path / "further", "cpu")


def test_a_gguf_file_is_a_base_too(recipe: Callable[..., Recipe], shared: Path, tmp_path: Path) -> None:
    file = shared / "small" / "model-q4_k_m.gguf"
    plan = replace(recipe(None, steps=1, batch=1, canvases=1), model=str(file))
    adapter = run(plan, tmp_path / "run", "cpu")
    lm = dgemma.load(adapter, "cpu")
    assert {matrix.kind for matrix in matrices(lm.model).values()} >= {"gguf"}
    assert adapter_state(lm.model)
    with pytest.raises(ValueError, match="an adapter cannot be merged into a GGUF file"):
        merge(str(adapter), tmp_path / "merged")


def test_what_cannot_be(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantised weights cannot train: with lora \(--lora RANK, or \[lora\]"):
        run(replace(recipe(), lora=None), tmp_path, "cpu")
    with pytest.raises(ValueError, match="quantize='int3' is not one of"):
        run(recipe("int3"), tmp_path, "cpu")
    with pytest.raises(ValueError, match="quantize = 'int4' has no effect with scratch"):
        run(replace(recipe(), model="tiny", scratch=True), tmp_path, "cpu")
    assert not list(tmp_path.iterdir())


def test_the_command(base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag and the recipe's line come to the same; the flag counts."""
    asked: list[Recipe] = []
    monkeypatch.setattr(module, "run", lambda recipe, *rest: asked.append(recipe))
    path = tmp_path / "mine.toml"
    path.write_text(f'model = "{base}"\nquantize = "int4"\n[tasks]\n"{data}" = 1\n[lora]\nrank = 2\n')
    for arguments in ([], ["--quantize", "nvfp4"]):
        done = CliRunner().invoke(app, ["train", str(path), *arguments])
        assert done.exit_code == 0, done.output
    assert [recipe.quantize for recipe in asked] == ["int4", "nvfp4"]
    done = CliRunner().invoke(app, ["train", str(path), "--quantize", "int3"])
    assert done.exit_code == 2
