"""`dgemma verify` of a GGUF file. Its weights are read once, some rows at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dgemma.checkpoints.gguf import fitted
from dgemma.checkpoints.gguf_header import Gguf, GgufTensor, read_gguf_header
from dgemma.checkpoints.headers import listed
from dgemma.checkpoints.load import load_gguf
from dgemma.checkpoints.reading import DTYPES
from dgemma.checkpoints.verify import (
    Finding,
    Progress,
    Verdict,
    attempted,
    check_logits,
    check_template,
    check_tokenizer,
    count_not_finite,
    not_finite,
)
from dgemma.quant.ggml import decode
from dgemma.text import ggml_tokenizer
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer

ROWS = 1024
"""Decoded at once."""
TEMPLATE = "tokenizer.chat_template"


def verify_gguf(
    path: Path, logits: bool = True, device: str = "auto", progress: Progress | None = None
) -> Iterator[Finding]:
    """As `verify`."""
    try:
        header = read_gguf_header(path)
    except (OSError, ValueError) as error:
        yield Finding("config", "wrong", str(error))
        return
    yield Finding("config", "ok", f"{header.config.num_hidden_layers} layers, GGUF")
    sound = True
    for name, check in (("tensors", partial(_tensors, path)), ("values", partial(_values, progress))):
        finding = attempted(name, partial(check, header))
        sound = sound and finding.verdict == "ok"
        yield finding
    yield attempted("tokenizer", partial(_tokenizer, header))
    yield attempted("chat template", partial(_template, header))
    yield check_logits(header.config, logits, sound, lambda: load_gguf(fitted(path, header), device))


def _tensors(path: Path, header: Gguf) -> tuple[Verdict, str]:
    fitted(path, header)
    return "ok", f"{len(header.tensors)} are those of the keys, in name and shape"


def _values(progress: Progress | None, header: Gguf) -> tuple[Verdict, str]:
    total, done = sum(tensor.data.nbytes for tensor in header.tensors.values()), 0
    faults = []
    for name, tensor in header.tensors.items():
        if count := _count_not_finite(tensor):
            faults.append(not_finite(name, count))
        done += tensor.data.nbytes
        if progress:
            progress(done, total)
    if faults:
        raise ValueError(listed(faults, "fault"))
    return "ok", f"every number of {len(header.tensors)} tensors is finite"


def _count_not_finite(tensor: GgufTensor) -> int:
    """Of a quantised tensor among the decoded numbers."""
    if not tensor.data.size:
        return 0
    data = torch.from_numpy(np.atleast_1d(tensor.data))
    parts = data.view(-1, data.shape[-1]).split(ROWS)
    plain = DTYPES.get(tensor.type)
    return sum(count_not_finite(part.view(plain) if plain else decode(tensor.type, part)) for part in parts)


def _tokenizer(header: Gguf) -> tuple[Verdict, str]:
    tokenizer = Tokenizer(ggml_tokenizer.backend(header.keys), ggml_tokenizer.names(header.keys))
    return "ok", check_tokenizer(tokenizer, header.config, TEMPLATE in header.keys)


def _template(header: Gguf) -> tuple[Verdict, str]:
    source = header.keys.get(TEMPLATE)
    return check_template(ChatTemplate(source, ggml_tokenizer.names(header.keys)) if source else None)
