"""`dgemma verify`: whether a model directory is whole. Its weights are read once, a matrix at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.headers import StoredTensor, listed, model_json, stored_tensors
from dgemma.checkpoints.layouts import Layout, read_layout
from dgemma.checkpoints.load import load_model, match_names, resolve_dtype
from dgemma.checkpoints.names import stored_name
from dgemma.checkpoints.pieces import Piece, assembled, check_complete, is_plain, packed, pieces_of
from dgemma.checkpoints.reading import DTYPES, Reader, slices
from dgemma.checkpoints.release import GOLDEN, TEMPLATES, TOKENIZER, Golden, is_release
from dgemma.checkpoints.source import ADAPTER
from dgemma.config import GenerationConfig, ModelConfig, read_json
from dgemma.model.network import DiffusionGemma
from dgemma.quant.formats import W4A8, Float8, Nvfp4
from dgemma.quant.modules import matrices
from dgemma.quant.packed import Packed
from dgemma.text.chat import ChatTemplate
from dgemma.text.output import MARKS
from dgemma.text.tokenizer import Tokenizer, read_config

Verdict = Literal["ok", "wrong", "skipped"]
Progress = Callable[[int, int], None]
"""Takes the bytes of weights that have been read, and those there are."""

TOLERANCE = 0.5
"""Of bfloat16 logits: eight of its steps at 16, where the largest of the golden ones lie; kernels differ by some."""
TOLERANCE_QUANTISED = 3.0
"""Half the least gap between the two best of the golden tokens and the others: within it, their order holds. Weights
that lie in wrong places are further off."""


@dataclass(frozen=True)
class Finding:
    """What one check came to."""

    check: str
    verdict: Verdict
    detail: str


def verify(
    directory: Path, logits: bool = True, device: str = "auto", progress: Progress | None = None
) -> Iterator[Finding]:
    """Findings as they are made; nothing that is wrong with a file raises.

    logits: whether the network is loaded, if it should be the release's, and held against published logits.
    """
    try:
        if (directory / ADAPTER).is_file() and not (directory / "config.json").is_file():
            base = read_json(directory / ADAPTER).get("base_model_name_or_path")
            raise ValueError(f"{directory} is an adapter of {base}: verify that, or what `dgemma merge` makes of both")
        values = model_json(directory)
        config, layout = ModelConfig.from_dict(values), read_layout(directory, values)
    except (OSError, ValueError) as error:
        yield Finding("config", "wrong", str(error))
        return
    yield Finding("config", "ok", f"{config.num_hidden_layers} layers, {layout.schemes[0].kind if layout else 'plain'}")
    sound = True
    for finding in _weights(directory, config, layout, progress or (lambda done, total: None)):
        sound = sound and finding.verdict == "ok"
        yield finding
    for name, check in (
        ("tokenizer", _tokenizer),
        ("chat template", _template),
        ("generation config", _generation),
    ):
        yield attempted(name, partial(check, directory, config))
    yield check_logits(config, logits, sound, partial(load_model, directory, device))


def attempted(name: str, check: Callable[[], tuple[Verdict, str]]) -> Finding:
    """A check's verdict, or the error that it raised."""
    try:
        return Finding(name, *check())
    except (OSError, ValueError) as error:
        return Finding(name, "wrong", str(error))


def check_logits(config: ModelConfig, asked: bool, sound: bool, load: Callable[[], DiffusionGemma]) -> Finding:
    """Loads the network if it should be the release's, is asked for and has sound weights."""
    if not is_release(config):
        return Finding("logits", "skipped", "golden logits are known of google/diffusiongemma-26B-A4B-it alone")
    if not (asked and sound):
        return Finding("logits", "skipped", "not asked for" if sound else "the weights are wrong")
    return compare_logits(load(), GOLDEN)


@torch.inference_mode()
def compare_logits(model: DiffusionGemma, golden: Golden) -> Finding:
    """Holds a first step's logits against golden ones; looser for quantised matrices, whose numbers are others."""
    quantised = bool(matrices(model))
    tolerance = TOLERANCE_QUANTISED if quantised else TOLERANCE
    cache = model.new_cache()
    model.encode(torch.tensor([golden.prompt]), cache)
    wanted = torch.tensor(golden.logits)
    canvas = torch.arange(model.config.canvas_length, device=model.device)[None]
    found = model.denoise(canvas, cache)[0, : wanted.shape[0], : wanted.shape[1]].cpu()
    most = (found - wanted).abs().max().item()
    told = f"off by {most:.2f} at most, where {tolerance:g} is allowed{' of quantised weights' if quantised else ''}"
    if most <= tolerance:
        return Finding("logits", "ok", told)
    return Finding("logits", "wrong", f"{told}; that is as it should be only if the model was fine-tuned")


def _weights(directory: Path, config: ModelConfig, layout: Layout | None, progress: Progress) -> Iterator[Finding]:
    names = "tensors"
    try:
        stored = stored_tensors(directory)
        model = empty_model(config, resolve_dtype(stored, "auto"))
    except (OSError, ValueError) as error:
        yield Finding(names, "wrong", str(error))
        yield Finding("values", "skipped", "the files cannot be read")
        return
    shapes = {stored_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pieces, unexpected = pieces_of(stored, shapes)
    problems = []
    try:
        match_names(directory, stored, shapes, pieces, unexpected, vision=config.vision is not None)
    except ValueError as error:
        problems.append(str(error))
    for target, parts in pieces.items():
        try:
            check_complete(target, shapes[target], parts)
        except ValueError as error:
            problems.append(str(error))
    told = f"{len(stored)} are those of the config, in name and shape"
    yield Finding(names, "wrong", "; ".join(problems)) if problems else Finding(names, "ok", told)
    faults = list(_faults(stored, shapes, pieces, layout, model.dtype, progress))
    told = f"every number of {len(stored)} tensors is finite"
    yield Finding("values", "wrong", listed(faults, "fault")) if faults else Finding("values", "ok", told)


def _faults(
    stored: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    pieces: dict[str, list[Piece]],
    layout: Layout | None,
    dtype: torch.dtype,
    progress: Progress,
) -> Iterator[str]:
    """What is wrong with the values of tensors, and with the parts of quantised matrices."""
    in_pieces = [piece for parts in pieces.values() for piece in parts]
    taken = {name for piece in in_pieces for name in piece.parts.values()}
    total, done = sum(tensor.bytes for tensor in stored.values()), 0
    with Reader() as reader:
        for name in sorted(stored, key=lambda name: (stored[name].file, stored[name].begin)):
            entry = stored[name]
            if name in taken:
                continue
            if entry.dtype in DTYPES and entry.bytes:
                matrices = slices(entry) if len(entry.shape) == 3 else [entry]
                count = sum(count_not_finite(reader.tensor(matrix)) for matrix in matrices)
                if count:
                    yield not_finite(name, count)
            done += entry.bytes
            progress(done, total)
        for piece in in_pieces:
            try:
                yield from _faults_of(piece, shapes[piece.target], stored, layout, dtype, reader)
            except ValueError as error:
                yield str(error)
            done += sum(stored[name].bytes for name in piece.parts.values())
            progress(done, total)


def _faults_of(
    piece: Piece,
    shape: tuple[int, ...],
    stored: dict[str, StoredTensor],
    layout: Layout | None,
    dtype: torch.dtype,
    reader: Reader,
) -> Iterator[str]:
    if piece.expert is not None:  # read as a matrix of its own, not as rows of its stack
        shape = (piece.last - piece.first, shape[-1])
        piece = Piece(piece.target, piece.module, None, 0, shape[0], piece.parts)
    if is_plain(piece, stored):
        if count := count_not_finite(assembled(shape, [piece], stored, dtype, reader)):
            yield not_finite(piece.parts["weight"], count)
        return
    matrix = packed(shape, [piece], stored, layout, dtype, reader)
    found = list(_wrong_buffers(matrix))
    yield from (f"{piece.module}: {fault}" for fault in found)
    if not found and not _decodes(matrix):
        yield f"{piece.module}: its codes times its scales are not all finite in {dtype}"


def _wrong_buffers(matrix: Packed) -> Iterator[str]:
    """Codes and scales that mean no number. NaN codes of float8 are looked for here: decoding makes 480 of them."""
    buffers = dict(matrix.named_buffers())
    if isinstance(matrix, Float8) and (count := _nan_codes(buffers["codes"])):
        yield f"{count} float8 codes are NaN"
    scale = buffers["units" if isinstance(matrix, W4A8) else "scale"]
    if isinstance(matrix, Nvfp4):
        if count := _nan_codes(scale):
            yield f"{count} float8 scales are NaN"
        factor = buffers["factor"]
        if not (factor.isfinite() & (factor != 0)).all():
            yield "its factor is zero or not finite"
    elif count := int((~(scale.isfinite() & (scale > 0))).sum()):
        yield f"{count} scales are not finite and above zero"


def _decodes(matrix: Packed) -> bool:
    stack: Sequence[int | None] = range(matrix.shape[0]) if len(matrix.shape) == 3 else [None]
    tiles = [slice(first, first + matrix.step) for first in range(0, matrix.shape[-2], matrix.step)]
    return all(bool(matrix.rows(at, tile).isfinite().all()) for at in stack for tile in tiles)


def _nan_codes(codes: Tensor) -> int:
    return int((codes & 0x7F == 0x7F).sum())


def count_not_finite(values: Tensor) -> int:
    return values.numel() - int(values.isfinite().sum())


def not_finite(name: str, count: int) -> str:
    return f"{name}: {count} value{'s are' if count > 1 else ' is'} not finite"


def _tokenizer(directory: Path, config: ModelConfig) -> tuple[Verdict, str]:
    chats = (directory / "chat_template.jinja").is_file() or "chat_template" in read_config(directory)
    told = check_tokenizer(Tokenizer.from_directory(directory), config, chats)
    if not is_release(config):
        return "ok", told
    same = sha256((directory / "tokenizer.json").read_bytes()).hexdigest() == TOKENIZER
    return "ok", f"{told}, {'the release' if same else 'not the release'}'s file"


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, chats: bool) -> str:
    """How many tokens it has. ValueError if it does not fit the config or, of a model that chats, lacks marks."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{len(tokenizer)} tokens, but vocab_size is {config.vocab_size}")
    for name, found, known in (
        ("bos", tokenizer.bos_id, (config.bos_token_id,)),
        ("eos", tokenizer.eos_id, config.eos_token_id),
        ("pad", tokenizer.pad_id, (config.pad_token_id, None)),
    ):
        if found not in known:
            raise ValueError(f"its {name} token is {found}; that of config.json is {known[0]}")
    lost = [mark for mark in MARKS if tokenizer.id(mark) is None]
    if lost and chats:
        raise ValueError(f"it lacks {listed(lost, 'special token')}")
    return f"{len(tokenizer):,} tokens"


def _template(directory: Path, config: ModelConfig) -> tuple[Verdict, str]:
    return check_template(ChatTemplate.from_directory(directory))


def check_template(template: ChatTemplate | None) -> tuple[Verdict, str]:
    """ValueError if it does not render a message."""
    if template is None:
        return "skipped", "there is none: a base model takes plain text"
    if "ready?" not in template.render([{"role": "user", "content": "ready?"}]):
        raise ValueError("chat template: a user's message is not in what it renders")
    version = TEMPLATES.get(sha256(template.source.encode()).hexdigest())
    return "ok", f"the release's {version} version" if version else "renders a message; not the release's"


def _generation(directory: Path, config: ModelConfig) -> tuple[Verdict, str]:
    file = directory / "generation_config.json"
    if not file.exists():
        return "skipped", "there is none: the release's values count"
    ends = GenerationConfig.from_file(file).eos_token_id
    beyond = [str(end) for end in ends if not 0 <= end < config.vocab_size]
    if beyond:
        raise ValueError(f"eos_token_id {', '.join(beyond)} is beyond the vocabulary of {config.vocab_size}")
    return "ok", f"ends at {', '.join(map(str, ends))}"
