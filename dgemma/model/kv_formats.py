"""How pages hold keys and values: as they are, or in 8 bits with a scale for each token and head.

A scale is bfloat16 and lies behind its codes, so a page is one tensor in any format. Codes are made with the rounded
scale: on normal and heavy-tailed vectors of 256 and 512 its rounding adds less than 0.1 % to the error of the codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels.numbers import E4M3_UNIT, e4m3

SMALLEST = torch.finfo(torch.bfloat16).tiny
"""A scale for vectors of zeros to be divided by."""


@dataclass(frozen=True)
class PageFormat:
    """codes: the dtype of codes, torch.int8 or torch.float8_e4m3fn; None keeps keys and values in the model's dtype."""

    codes: torch.dtype | None = None

    @property
    def scale_bytes(self) -> int:
        """Of the scale of one key or value; in 8 bits also the columns it takes."""
        return torch.bfloat16.itemsize if self.codes else 0

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of pages; that of the codes shows only inside."""
        return torch.int8 if self.codes else model

    def encode(self, x: Tensor) -> Tensor:
        """What is stored, int8 [..., D + 2], of keys or values [..., D]."""
        if self.codes is None:
            return x
        whole = self.codes == torch.int8
        largest = 127 if whole else torch.finfo(self.codes).max
        scale = x.abs().amax(-1, keepdim=True).float().div_(largest).clamp_(min=SMALLEST).bfloat16()
        scaled = x / scale.float()  # at most 2^-9 above the largest code, which is what both roundings make of it
        codes = (scaled.round_() if whole else scaled).to(self.codes)
        return torch.cat((codes.view(torch.int8), scale.view(torch.int8)), dim=-1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys or values [..., D] of what `encode` made, in the model's dtype."""
        if self.codes is None:
            return stored
        codes, scale = stored.split((stored.shape[-1] - self.scale_bytes, self.scale_bytes), dim=-1)
        # Both products are exact in float32 but for the last rounding, to the model's dtype.
        values = codes.float() if self.codes == torch.int8 else e4m3(codes).mul_(E4M3_UNIT)
        return values.mul_(scale.view(torch.bfloat16).float()).to(dtype)


PLAIN = PageFormat()
FORMATS = {"int8": PageFormat(torch.int8), "fp8": PageFormat(torch.float8_e4m3fn)}


def page_format(name: str | None) -> PageFormat:
    """The format of an option `kv_cache`; None is the model's own dtype. ValueError for an unknown name."""
    if name is None:
        return PLAIN
    if name not in FORMATS:
        raise ValueError(f"kv_cache={name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]
