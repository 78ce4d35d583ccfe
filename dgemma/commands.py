"""`dgemma infill` and `dgemma edit`: a gap or a selection of a file. Importing this imports no torch."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma.config import GAP_MARKER, GAP_TOKENS
from dgemma.flags import Device, Dtype, KVCache, Quantize, UsageError, checked, config_flags, load_checked

if TYPE_CHECKING:
    from dgemma.edit import Edit
    from dgemma.infill import Infill
    from dgemma.terminal.layout import Piece

STDIN = "-"

Target = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL] [FILE]", help="FILE, - or nothing for standard input; MODEL is tiny if not told"),
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="what the text is the model's reply to")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 64) - 1, help="of all random draws")]
Write = Annotated[bool, typer.Option("--write", help="change FILE itself")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result with its telemetry as JSON")]


@config_flags
def infill(
    target: Target = None,
    at: Annotated[str | None, typer.Option(help="where the gap begins, from 1:1", metavar="LINE:COL")] = None,
    end: Annotated[str | None, typer.Option(help="where the text goes on; else at once", metavar="LINE:COL")] = None,
    marker: Annotated[str | None, typer.Option(help="what marks the gap without --at", show_default=GAP_MARKER)] = None,
    lengths: Annotated[str | None, typer.Option(help="of gaps to try, in tokens", metavar="N,N …")] = None,
    prompt: Prompt = None,
    show_all: Annotated[bool, typer.Option("--all", help="print a table of all candidates")] = False,
    as_json: AsJson = False,
    write: Write = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    *,
    config: dict[str, Any],
) -> None:
    """Fill a gap in a text: print what belongs there, or write it into the file.

    -n limits the gap (64 tokens if not told).
    """
    if show_all + as_json + write > 1:
        raise UsageError("--all, --json and --write exclude one another")
    if lengths is not None and "max_new_tokens" in config:
        raise UsageError("--lengths and --max-new-tokens exclude each other")
    if at is not None and marker is not None:
        raise UsageError("--marker has no effect with --at")
    if end is not None and at is None:
        raise UsageError("--end needs --at")
    if marker == "":
        raise UsageError("--marker is empty")
    tried = None if lengths is None else _numbers(lengths, ",", "--lengths", "8,16")
    model, file = _target(target, write)
    text = _read(file)
    prefix, suffix = _around(text, at, end) if at is not None else _parted(text, marker or GAP_MARKER)
    options = {name: value for name, value in config.items() if name != "max_new_tokens"}
    most = config.get("max_new_tokens", GAP_TOKENS)
    lm = load_checked(model, checked(model, options), device, dtype, quantize, kv_cache)
    from dgemma.terminal.layout import Style
    from dgemma.terminal.screen import note

    found = lm.infill(prefix, suffix, most, prompt=prompt, lengths=tried, seed=seed, **options)
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    elif show_all:
        print("\n".join(_table(found)))
    elif write:
        _replace(file, prefix + found.text + suffix)
    else:
        _show([(found.text, Style.PLAIN)])
    if found.repeated:
        note("the suffix does not fit the canvas: its head is pinned, and the prompt repeats the whole text")


@config_flags
def edit(
    target: Target = None,
    lines: Annotated[
        list[str] | None, typer.Option(help="to write anew, from 1; may be repeated", metavar="FIRST:LAST")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="what to change; the model must have a chat template")] = None,
    noise: Annotated[float, typer.Option(help="share of the old text that is noise, above 0")] = 1.0,
    prompt: Prompt = None,
    as_json: AsJson = False,
    write: Write = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    *,
    config: dict[str, Any],
) -> None:
    """Write lines of a text anew, or all of it: print the change as a diff, or apply it to the file."""
    if as_json and write:
        raise UsageError("--json and --write exclude each other")
    if instruction is not None and prompt is not None:
        raise UsageError("--instruction and --prompt exclude each other")
    if not 0 < noise <= 1:
        raise UsageError(f"--noise must lie above 0 and be at most 1, not {noise}")
    if not lines and instruction is None and noise == 1:
        raise UsageError("nothing of the text would be left: give --lines, --instruction, or --noise below 1")
    if "max_new_tokens" in config and (lines or instruction is None):
        raise UsageError("--max-new-tokens has no effect: an edit keeps the number of tokens")
    model, file = _target(target, write)
    text = _read(file)
    if not text:
        raise UsageError(f"{file} is empty: there is nothing to edit")
    spans = [_span(text, given) for given in lines] if lines else None
    lm = load_checked(model, checked(model, config), device, dtype, quantize, kv_cache)
    from dgemma.terminal.screen import note

    made = lm.edit(text, spans, instruction, noise, prompt=prompt, seed=seed, **config)
    if as_json:
        print(json.dumps({**asdict(made), "diff": made.diff(_name(file))}, indent=2, ensure_ascii=False))
    elif write:
        _replace(file, made.text)
    else:
        _show(_coloured(made, _name(file)))
    if made.text == text:
        note("nothing changed")
    if made.cut:
        note("cut at the limit (--max-new-tokens)")


def _target(given: Sequence[str] | None, write: bool) -> tuple[str, str]:
    """Model and file; of one argument, the file."""
    values = list(given or [STDIN])
    if len(values) > 2:
        raise UsageError(f"at most a model and a file are taken; {values[2]!r} is one more")
    model, file = values if len(values) == 2 else ("tiny", values[0])
    if file == STDIN and write:
        raise UsageError("--write needs a FILE")
    return model, file


def _read(file: str) -> str:
    """The text, with its line ends as they are."""
    if file == STDIN and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("there is no text: name a FILE, or pipe one in")
    try:
        return (sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{_name(file)} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None


def _name(file: str) -> str:
    return "standard input" if file == STDIN else file


def _numbers(given: str, separator: str, option: str, example: str) -> list[int]:
    parts = given.split(separator)
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} takes numbers from 1, like {example}, not {given!r}")
    return [int(part) for part in parts]


def _parted(text: str, marker: str) -> tuple[str, str]:
    count = text.count(marker)
    if count != 1:
        raise UsageError(f"the text must hold {marker} once, not {count} times: mark the gap, or give --at")
    prefix, _, suffix = text.partition(marker)
    return prefix, suffix


def _around(text: str, at: str, end: str | None) -> tuple[str, str]:
    """The text before a place, and from there, or from another place, on."""
    start = _offset(text, at, "--at")
    stop = start if end is None else _offset(text, end, "--end")
    if stop < start:
        raise UsageError(f"--end {end} lies before --at {at}")
    return text[:start], text[stop:]


def _offset(text: str, given: str, option: str) -> int:
    """The character at LINE:COL, from 1:1; the column behind a line's last character is its end."""
    place = _numbers(given, ":", option, "3:17")
    if len(place) != 2:
        raise UsageError(f"{option} takes LINE:COL, like 3:17, not {given!r}")
    line, column = place
    rows = text.split("\n")
    if line > len(rows):
        raise UsageError(f"{option} {given}: the text has {len(rows)} lines")
    if column > len(rows[line - 1]) + 1:
        raise UsageError(f"{option} {given}: line {line} ends at column {len(rows[line - 1]) + 1}")
    return sum(len(row) + 1 for row in rows[: line - 1]) + column - 1


def _span(text: str, given: str) -> tuple[int, int]:
    """The characters of the lines FIRST:LAST, or of one line, without the end of the last one."""
    first, *more = _numbers(given, ":", "--lines", "10:20")
    last = more[0] if more else first
    rows = text.removesuffix("\n").split("\n")
    if len(more) > 1 or last < first:
        raise UsageError(f"--lines takes FIRST:LAST, like 10:20, not {given!r}")
    if last > len(rows):
        raise UsageError(f"--lines {given}: the text has {len(rows)} lines")
    start = sum(len(row) + 1 for row in rows[: first - 1])
    stop = start + len("\n".join(rows[first - 1 : last]))
    if start == stop:
        raise UsageError(f"--lines {given}: there is nothing in them; dgemma infill writes what is not there")
    return start, stop


def _replace(file: str, text: str) -> None:
    """The file's new text takes the old one's place at once, with its mode; a link stays one."""
    path = Path(file).resolve()
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_bytes(text.encode())
        shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _table(found: "Infill") -> list[str]:
    """The candidates, best first: tokens, log-probability, steps, text as a JSON string."""
    rows = [
        f"{c.length:>6} {c.log_probability:>9.2f} {c.steps:>5}  {json.dumps(c.text, ensure_ascii=False)}"
        for c in found.candidates
    ]
    return [f"{'tokens':>6} {'log p':>9} {'steps':>5}  text", *rows]


def _coloured(made: "Edit", name: str) -> "list[Piece]":
    from dgemma.terminal.layout import Style

    styles = {"+": Style.ACCEPTED, "-": Style.RENOISED, "@": Style.FAINT}
    return [(line, styles.get(line[0], Style.PLAIN)) for line in made.diff(name).splitlines(keepends=True) if line]


def _show(pieces: "list[Piece]") -> None:
    from dgemma.terminal.screen import Screen

    screen = Screen(sys.stdout)
    screen.show(pieces)
    screen.end_line()
