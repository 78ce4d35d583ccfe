"""ggml's blocks against the `gguf` package's dequantisation, bit for bit."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from dgemma.quant.ggml import BLOCKS, decode

gguf = pytest.importorskip("gguf", reason="the oracle is the gguf package")

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2]} | {
    **{"Q6_K": [208]},
}
"""Where the float16 scales of a block lie."""


def random_rows(type: str, *shape: int) -> Tensor:
    """Rows of random bytes [..., blocks * bytes], every scale a finite float16 of any size, subnormal ones too."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, BLOCKS[type].bytes), dtype=np.uint8)
    for at in HALVES[type]:
        bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
        finite = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)
        blocks[..., at : at + 2] = finite[..., None].view(np.uint8)
    return torch.from_numpy(blocks).flatten(-2)


def reference(type: str, rows: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[type]))


@pytest.mark.parametrize("type", BLOCKS)
def test_random_bytes(type: str) -> None:
    rows = random_rows(type, 3, 40, 5)
    values = decode(type, rows)
    assert values.shape == (3, 40, 5 * BLOCKS[type].elements)
    assert values.dtype == torch.float32
    wanted = reference(type, rows)
    assert torch.equal(values.view(torch.int32), wanted.view(torch.int32))  # signs of zeros too


@pytest.mark.parametrize("type", BLOCKS)
def test_sizes_are_those_of_ggml(type: str) -> None:
    assert (BLOCKS[type].elements, BLOCKS[type].bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]


@pytest.mark.parametrize("type", BLOCKS)
def test_rows_stay_as_they_are_and_may_be_a_part(type: str) -> None:
    """A tile of a read-only map: decoding never writes into it, and takes any rows and blocks of it."""
    rows = random_rows(type, 6, 4)
    before = rows.clone()
    size = BLOCKS[type].bytes
    array = rows.numpy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors
        mapped = torch.from_numpy(array)
    part = decode(type, mapped[1::2, size : 3 * size])
    assert torch.equal(part, reference(type, before[1::2, size : 3 * size].contiguous()))
    assert torch.equal(rows, before)
    assert decode(type, rows[0]).shape == (4 * BLOCKS[type].elements,)
    assert decode(type, rows[:0]).shape == (0, 4 * BLOCKS[type].elements)


def test_wrong_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"'Q2_K' is not known; known are Q4_0"):
        decode("Q2_K", torch.zeros(84, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"rows of Q8_0 are uint8 in blocks of 34 bytes, not torch.uint8 \[2, 33\]"):
        decode("Q8_0", torch.zeros(2, 33, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"not torch.int16 \[34\]"):
        decode("Q8_0", torch.zeros(34, dtype=torch.int16))
