"""Number formats: every code, encoding that cannot be bettered, products of packed matrices, quantising at load."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import random_lm

from dgemma.checkpoints.load import load_model
from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig
from dgemma.model.head import TiedEmbedding
from dgemma.model.network import DiffusionGemma
from dgemma.quant import packed as tiles
from dgemma.quant.formats import E2M1_ENDS, E2M1_UNIT, E4M3_UNIT, FORMATS, W4A8, Int8, Nvfp4, e2m1, e4m3
from dgemma.quant.modules import QuantEmbedding, matrices
from dgemma.quant.quantize import Quantization

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LARGE = r"layers\.\d+\.(self_attn\.[qkvo]_proj\.weight|mlp\.\w+_proj\.weight|experts\.\w+_proj)"


EXACT = [kind for kind in FORMATS if kind != "w4a8"]
"""Formats whose products leave x as it is, unless told otherwise."""


def bits(x):
    return x.view(torch.int32)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack(kind, weight, group=32, dtype=torch.float32, **options):
    """A matrix, or a stack encoded matrix by matrix."""
    parts = [FORMATS[kind].encode(matrix, group) for matrix in weight.view(-1, *weight.shape[-2:])]
    buffers = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    whole = {name: part.view(*weight.shape[:-2], *part.shape[1:]) for name, part in buffers.items()}
    return FORMATS[kind](weight.shape, dtype, **options, **whole)


def test_every_float8_code():
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    finite = ~numbers.isnan()
    assert finite.sum() == 254
    values = e4m3(codes) * E4M3_UNIT
    assert torch.equal(bits(values)[finite], bits(numbers)[finite])
    assert values[~finite].tolist() == [480, -480]


def test_every_pair_of_float4_codes():
    pairs = torch.arange(256, dtype=torch.uint8)
    signed = torch.cat((E2M1, -E2M1))
    low, high = e2m1(pairs[None])[0] * E2M1_UNIT
    assert torch.equal(bits(low), bits(signed.repeat(16)))
    assert torch.equal(bits(high), bits(signed.repeat_interleave(16)))


def test_float4_ties_go_to_the_even_code():
    steps = torch.tensor([*E2M1_ENDS, -5.0])
    weight = torch.cat((steps, torch.full((8,), 6.0)))[None]  # the largest makes the scale 1
    assert Nvfp4((1, 16), torch.float32, **Nvfp4.encode(weight, 16)).dense()[0, :8].tolist() == [
        0,
        1,
        1,
        2,
        2,
        4,
        4,
        -4,
    ]


@pytest.mark.parametrize("size", [1.0, 1e4, 1e-3, 1e-6])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_encoding_is_within_the_steps_of_the_format(kind, stored, size):
    weight = (random(48, 64) * size * torch.linspace(0.1, 1, 48)[:, None]).to(stored)
    weight[3] = 0
    weight[5, 32:] = 0
    matrix = pack(kind, weight)
    error, wide = (matrix.dense() - weight.float()).abs(), weight.float().abs()
    top = wide.amax(-1, keepdim=True)
    assert error[3].max() == 0
    assert error[5, 32:].max() == 0
    match kind:
        case "fp8":  # half a step of the 3-bit mantissa, or of the smallest step at the largest's scale
            assert (error <= 1.01 * torch.maximum(wide * 2**-4, top / 448 * 2**-10)).all()
        case "int8":
            assert (error <= 1.01 * top / 127 / 2).all()
        case "int4":  # what the narrowest scale, rounded, cuts off: a little more than an eighth
            assert (error <= 1.03 * wide.unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1) / 8).all()
        case "w4a8":  # the scale may be a fifteenth of the row's largest too narrow
            groups = wide.unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
            assert (error <= 1.03 * groups / 8 + top / 15 / 2).all()
        case "nvfp4":  # no value of the format at the same scale is nearer
            scale = (e4m3(matrix.scale) * E4M3_UNIT / matrix.factor).repeat_interleave(16, -1)[..., None]
            best = (wide[..., None] - E2M1 * scale).abs().amin(-1)
            assert (error <= best + 1e-6 * top).all()
            groups = wide.unflatten(-1, (-1, 16)).amax(-1)
            assert ((scale[:, ::16, 0] * 6 - groups).abs() <= 2**-4 * groups + 2**-10 * 6 / matrix.factor).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_int4_is_no_worse_than_rounding_to_nearest(group, stored):
    weight = random(64, 128).to(stored)
    matrix = pack("int4", weight, group)
    assert matrix.scale.shape == (64, 128 // group)
    assert matrix.scale.dtype == torch.bfloat16
    grouped = weight.float().unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    nearest = (grouped / scale).round().clamp(-8, 7) * scale
    plain = (nearest - grouped).square().sum(-1)
    ours = (matrix.dense().unflatten(-1, (-1, group)) - grouped).square().sum(-1)
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.98 * plain.sum()  # the search is worth something


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("kind", EXACT)
def test_products(kind, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    stack = pack(kind, random(3, 72, 64))
    assert stack.step == (16 if tiled else 1 << 12)  # 72 rows: the last tile is short
    single = pack(kind, random(3, 72, 64)[1])
    assert torch.equal(stack.dense(1), single.dense())
    assert not torch.equal(stack.dense(0), stack.dense(1))
    x, y = random(5, 64, seed=1), random(5, 72, seed=2)
    for matrix, at in ((stack, 1), (stack, 2), (single, None)):
        wide = matrix.dense(at).double()
        torch.testing.assert_close(matrix.product(x, at).double(), x.double() @ wide.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(matrix.transposed(y, at).double(), y.double() @ wide, rtol=1e-5, atol=1e-4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (stack.product(ours, 2) * y).sum().backward()
    (theirs @ stack.dense(2).T * y).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", EXACT)
def test_products_in_bfloat16(kind):
    matrix, x = pack(kind, random(48, 64), dtype=torch.bfloat16), random(5, 64, seed=1).bfloat16()
    assert matrix.product(x).dtype == matrix.dense().dtype == torch.bfloat16
    torch.testing.assert_close(matrix.product(x), x @ matrix.dense().T, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("rows", [1, 5])
def test_int8_rounds_activations_a_token_at_a_time(rows):
    stack = pack("int8", random(2, 48, 64), activations=True)
    x = random(rows, 64, seed=1) * torch.logspace(-3, 3, rows)[:, None]
    x[0] = 0 if rows > 1 else x[0]
    step = np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(x.numpy() / np.maximum(step, np.float32(1e-30))).astype(np.int64)
    exact = codes @ stack.codes[1].numpy().astype(np.int64).T
    expected = torch.from_numpy(exact * step.astype(np.float64)) * stack.scale[1].double().T
    torch.testing.assert_close(stack.product(x, 1).double(), expected, rtol=1e-6, atol=0)
    plain = pack("int8", random(2, 48, 64))
    assert not torch.allclose(plain.product(x, 1).double(), expected, rtol=1e-4)
    through = x.clone().requires_grad_()
    stack.product(through, 1).sum().backward()
    torch.testing.assert_close(through.grad, stack.dense(1).sum(0).expand(rows, -1), rtol=1e-5, atol=1e-5)


def test_sums_of_a_processor_that_cuts_them_off_are_not_used():
    """oneDNN held to instructions that add two products in 16 bits: 127 times 127, twice, is more than they hold."""
    code = (
        "import torch; from dgemma.quant import integers;"
        "x = torch.randint(-127, 128, (16, 256), dtype=torch.int8); w = torch.full((32, 256), 127, dtype=torch.int8);"
        "exact = x.double() @ w.t().double();"
        "assert torch.equal(integers.int_product(x, w.t()).double(), exact);"
        "print(integers.sums_are_exact(), torch.equal(torch._int_mm(x, w.t()).double(), exact))"
    )
    for isa in ("AVX2", "DEFAULT"):
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        trusted, right = done.stdout.split()
        assert trusted == right


@pytest.mark.parametrize("group", [32, 64])
def test_w4a8_is_int4_with_products_of_integers(group):
    """A weight is a unit times an int8, the file's scales are exact in bfloat16, x is rounded a row at a time."""
    weight = random(3, 48, 128) * torch.logspace(-2, 0, 128)
    stack = pack("w4a8", weight, group)
    assert torch.equal((stack.units * stack.multiple).bfloat16().float(), stack.units * stack.multiple)
    codes, scale = W4A8.to_int4(**dict(stack.named_buffers()))
    int4 = FORMATS["int4"](stack.shape, torch.float32, codes=codes, scale=scale)
    assert torch.equal(stack.dense(), int4.dense())
    for name, part in W4A8.of_int4(codes, scale).items():
        assert torch.equal(part, stack.get_buffer(name))
    integers = (stack.dense(1) / stack.units[1]).round()
    assert torch.equal(integers * stack.units[1], stack.dense(1))
    assert 8 < integers.abs().max() <= 120
    x = random(5, 128, seed=1)
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round().double() @ integers.double().T) * step.double() * stack.units[1].double().T
    torch.testing.assert_close(stack.product(x, 1).double(), expected, rtol=1e-5, atol=1e-6)
    through = x.clone().requires_grad_()
    stack.product(through, 1).sum().backward()
    torch.testing.assert_close(through.grad, stack.dense(1).sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


def test_w4a8_costs_hardly_more_than_int4():
    weight = random(64, 256) * torch.rand(64, 8, generator=torch.Generator().manual_seed(3)).repeat_interleave(32, -1)
    errors = {kind: (pack(kind, weight).dense() - weight).square().sum() for kind in ("int4", "w4a8")}
    assert errors["w4a8"] < 1.1 * errors["int4"]
    assert pack("w4a8", weight).nbytes < pack("int4", weight).nbytes


def test_scales_of_other_makers_have_no_factors():
    scale = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16() + 0.5
    assert W4A8.of_int4(torch.zeros(4, 256, dtype=torch.uint8), scale) is None


def test_parts_that_are_not_rows_of_the_matrix():
    with pytest.raises(ValueError, match=r"scale has shape \[47, 1\], which are not rows of a matrix \[48, 64\]"):
        Int8((48, 64), torch.float32, codes=torch.zeros(48, 64, dtype=torch.int8), scale=torch.ones(47, 1))


@pytest.fixture(scope="module")
def config():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4}
    return replace(random_lm().model.config, head_dim=32, global_head_dim=32, top_k_experts=2, **sizes)


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    model = DiffusionGemma(config).init_weights(0).requires_grad_(False).eval()
    save_model(model, tmp_path_factory.mktemp("plain"), GenerationConfig())
    directory = tmp_path_factory.mktemp("saved")
    save_model(model, directory, GenerationConfig())
    return model, directory


@torch.no_grad()
def denoised(model):
    cache = model.new_cache()
    model.encode(torch.arange(20, 50)[None], cache)
    first = model.denoise(torch.arange(100, 116)[None], cache)
    return model.denoise(torch.arange(100, 116)[None], cache, first)


@pytest.mark.parametrize(
    ("wish", "bound"),
    [
        ("int8", 0.1),
        ("fp8", 0.2),
        ("int4", 0.7),
        ("nvfp4", 0.7),
        ("w4a8", 0.7),
        (Quantization("int4", embeddings=True), 0.7),
        (Quantization("fp8", embeddings=True), 0.2),
    ],
    ids=str,
)
def test_quantising_at_load(saved, wish, bound):
    plain, directory = saved
    loaded = load_model(directory, "cpu", quantize=wish)
    asked = Quantization(wish) if isinstance(wish, str) else wish
    state, found = plain.state_dict(), matrices(loaded)
    chosen = {name for name in state if re.fullmatch(LARGE, name)}
    assert found.keys() == chosen | ({"embed_tokens.weight"} if asked.embeddings else set())
    for name, matrix in found.items():
        kind = asked.format if "experts" in name else {"fp8": "fp8", "nvfp4": "fp8"}.get(asked.format, "int8")
        kind = "int8" if name == "embed_tokens.weight" else kind
        expected = pack(kind, state[name])
        assert type(matrix) is type(expected)
        assert matrix.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(part, expected.state_dict()[key]) for key, part in matrix.state_dict().items()), name
        if kind == "int8":
            assert matrix.activations == (name != "embed_tokens.weight" and asked.format != "int4")
    for name, tensor in loaded.state_dict().items():
        assert name not in state or torch.equal(tensor, state[name])
    expected, logits = denoised(plain), denoised(loaded)
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < bound


def test_a_quantised_model_answers(saved):
    _, directory = saved
    lm = random_lm()
    quantised = replace(lm, model=load_model(directory, "cpu", quantize=Quantization("int4", embeddings=True)))
    dense = load_model(directory, "cpu")
    state = dense.state_dict()
    for name, matrix in matrices(quantised.model).items():
        stack = len(matrix.shape) == 3
        state[name].copy_(torch.stack([matrix.dense(e) for e in range(4)]) if stack else matrix.dense())
    answers = [
        one.generate("the cat", max_new_tokens=16, max_denoising_steps=3, seed=1)
        for one in (quantised, replace(lm, model=dense))
    ]
    assert answers[0].tokens == answers[1].tokens
    assert len(answers[0].text) > 0


@pytest.mark.parametrize(
    ("wish", "inner", "message"),
    [
        (Quantization("int4"), 48, "48 columns, which groups of 32 do not divide$"),
        (Quantization("int4", group=128), 64, "64 columns, which groups of 128 do not divide; groups of 32, 64 would"),
        (Quantization("nvfp4"), 24, "24 columns, which groups of 16 do not divide$"),
    ],
    ids=str,
)
def test_groups_that_do_not_divide(config, tmp_path, wish, inner, message):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": inner, "head_dim": 64}
    model = DiffusionGemma(replace(config, **sizes, global_head_dim=64)).init_weights(0)
    save_model(model, tmp_path, GenerationConfig())
    with pytest.raises(ValueError, match=rf"layers\.0\.experts\.down_proj has {message}"):
        load_model(tmp_path, "cpu", quantize=wish)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int3"}, "quantize='int3' is not one of"),
        ({"format": "int4", "group": 48}, "group 48 is not one of"),
    ],
)
def test_wishes_that_are_not_known(values, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EXACT)
@torch.no_grad()
def test_embeddings(config, kind, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    plain = TiedEmbedding(config).to(dtype)
    plain.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    quantised = QuantEmbedding(plain, pack(kind, plain.weight, dtype=dtype))
    plain.weight.copy_(quantised.weight.dense())
    tokens = torch.tensor([[3, 447, 0], [9, 9, 100]])
    assert torch.equal(quantised(tokens), plain(tokens))
    x, beliefs = random(2, 3, 64, seed=1).to(dtype), random(2, 3, 448, seed=2).softmax(-1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.05}
    torch.testing.assert_close(quantised.scores(x), plain.scores(x), **close)
    torch.testing.assert_close(quantised.logits(x), plain.logits(x), **close)
    torch.testing.assert_close(quantised.scores_by_token(x[0]), plain.scores_by_token(x[0]), **close)
    torch.testing.assert_close(quantised.soft(beliefs[0]), plain.soft(beliefs[0]), **close)
    torch.testing.assert_close(quantised.soft(beliefs), plain.soft(beliefs), **close)
