"""A recorded generation as a page, a moving picture, or a strip of pictures that stay."""

import json
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dgemma.terminal.canvas import SPECIAL, CanvasText
from dgemma.terminal.layout import Piece, Row, Style, cells, clusters, wrap
from dgemma.terminal.replay import Recording, Spellings
from dgemma.terminal.view import LEGEND
from dgemma.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image, ImageFont

COLUMNS, ROWS = 80, 40
"""Cells of a moving picture at most; of longer texts it shows the end."""

HOLD = 2.0
"""Seconds that a moving picture's last step stays."""

SHORTEST = 0.02
"""Seconds of a frame; viewers show shorter ones at a speed of their own."""

BACKGROUND = "#292929"
COLOURS = {
    Style.PLAIN: "#c5c8c6",
    Style.FAINT: "#868887",
    Style.ACCEPTED: "#98a84b",
    Style.CHANGED: "#d0b344",
    Style.RENOISED: "#868887",
}
_STATES = {Style.ACCEPTED: "a", Style.CHANGED: "c", Style.RENOISED: "r"}


class Panel(NamedTuple):
    """A canvas at one step: rows of text under a heading."""

    heading: str
    rows: list[Row]

    @property
    def columns(self) -> int:
        return max(cells(self.heading), *(sum(c.cells for c in row) for row in self.rows), 0)


def panels(shown: Recording) -> list[Panel]:
    """A panel for each step: the text before its block, and the canvas in the colours of what became of it.

    A generation without steps, which came left to right, is one panel with its text.
    """
    canvas = CanvasText(shown.tokenizer, shown.ends)
    made = []
    for step, before in shown.steps:
        pieces: list[Piece] = [(shown.settled(step.block), Style.PLAIN), *canvas.pieces(step, before)]
        heading = f"block {step.block + 1} · step {step.step} · H {step.mean_entropy:.3f}"
        made.append(Panel(heading, wrap(pieces, COLUMNS)[-ROWS:]))
    text = "" if made else shown.settled(len(shown.events))
    return made or [Panel(shown.header.model, wrap([(text, Style.PLAIN)], COLUMNS)[-ROWS:])]


# SVG: a terminal's window, drawn on a grid of cells.

CELL, LINE = 12.2, 24.4
LEFT, TOP = 26.0, 61.0


def film(title: str, frames: Sequence[Panel], seconds: float) -> str:
    """A moving SVG: the frames one after another, then from the start. Where nothing moves, the last one stands."""
    seconds = max(seconds, SHORTEST)
    period = len(frames) * seconds + HOLD
    drawn = []
    for i, frame in enumerate(frames):
        kind = "frame last" if i == len(frames) - 1 else "frame"
        body = "".join(_panel(frame, 0))
        drawn.append(f'<g class="{kind}" style="animation-delay:{i * seconds - period:.3f}s">{body}</g>\n')
    css = (
        f".frame {{ visibility: hidden; animation: frame {period:.3f}s step-end infinite }}\n"
        f".last {{ visibility: visible; animation-name: last }}\n"
        f"@keyframes frame {{ 0% {{ visibility: visible }} {100 * seconds / period:.4f}% {{ visibility: hidden }} }}\n"
        f"@keyframes last {{ 0% {{ visibility: visible }} "
        f"{100 * (seconds + HOLD) / period:.4f}% {{ visibility: hidden }} }}\n"
        "@media (prefers-reduced-motion: reduce) { .frame { animation: none } }\n"
    )
    columns = max(frame.columns for frame in frames)
    height = max(len(frame.rows) for frame in frames) + 1
    return _window(title, columns, height, "".join(drawn), _legend(), css)


def strip(title: str, side_by_side: Sequence[Panel], note: str) -> str:
    """An SVG that stays: panels beside each other, and a note behind the legend."""
    drawn, at = [], 0
    for panel in side_by_side:
        drawn += [*_panel(panel, at), "\n"]
        at += panel.columns + 4
    height = max(len(panel.rows) for panel in side_by_side) + 1
    return _window(title, at - 4, height, "".join(drawn), _legend(note))


def _legend(note: str = "") -> Row:
    pieces: list[Piece] = [piece for entry in LEGEND for piece in (entry, ("   ", Style.PLAIN))]
    return list(clusters([*pieces, (note, Style.PLAIN)] if note else pieces[:-1]))


def _window(title: str, columns: int, height: int, body: str, legend: Row, css: str = "") -> str:
    """`columns` by `height` cells of content in a window, the legend below."""
    columns = max(columns, len(legend), cells(title) + 12)
    width, bottom = 2 * LEFT + columns * CELL, TOP + (height + 0.5) * LINE + 20
    styles = "".join(f".{style.name.lower()} {{ fill: {colour} }}\n" for style, colour in COLOURS.items())
    lights = "".join(
        f'<circle cx="{27 + 22 * i}" cy="23" r="7" fill="{colour}"/>'
        for i, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width:.1f} {bottom:.1f}" '
        f'width="{width:.1f}" height="{bottom:.1f}">\n'
        "<style>\ntext { font: 20px 'Fira Code', monospace; white-space: pre }\n"
        f".title {{ font: bold 18px arial, sans-serif; fill: #c5c8c6 }}\n{styles}"
        f".accepted, .heading {{ font-weight: bold }}\n.heading {{ fill: #c5c8c6 }}\n{css}</style>\n"
        f'<rect fill="{BACKGROUND}" stroke="#fff" stroke-opacity="0.35" x="1" y="1" rx="8" '
        f'width="{width - 2:.1f}" height="{bottom - 2:.1f}"/>\n{lights}\n'
        f'<text class="title" text-anchor="middle" x="{width / 2:.1f}" y="28">{_xml(title)}</text>\n'
        f"{body}{''.join(_row(legend, 0, height + 0.5))}\n</svg>\n"
    )


def _panel(panel: Panel, column: int) -> list[str]:
    lines = [_row(row, column, i) for i, row in enumerate(panel.rows, 1)]
    return [
        _text("heading", panel.heading, cells(panel.heading), column, 0),
        *(text for line in lines for text in line),
    ]


def _row(row: Row, column: int, line: float) -> list[str]:
    """A text for each run of a style, held to its cells whatever the viewer's font."""
    drawn = []
    for style, run in groupby(row, key=lambda cluster: cluster.style):
        clusters = list(run)
        text, width = "".join(c.text for c in clusters), sum(c.cells for c in clusters)
        if not text.isspace():
            drawn.append(_text(style.name.lower(), text, width, column, line))
        column += width
    return drawn


def _text(kind: str, text: str, width: int, column: int, line: float) -> str:
    x, y = LEFT + column * CELL, TOP + line * LINE
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" textLength="{width * CELL:.1f}">{_xml(text)}</text>'


def _xml(text: str) -> str:
    return escape(re.sub("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))


# GIF

FONTS = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")
SIZE, MARGIN = 16, 14


def write_gif(path: Path, frames: Sequence[Panel], seconds: float) -> None:
    """The frames as a GIF that repeats. Needs pillow; characters that its font lacks are boxes."""
    try:
        from PIL import ImageFont
    except ImportError:
        raise ValueError("a GIF needs pillow: pip install 'dgemma[media]'") from None

    font = _font(ImageFont.truetype, ImageFont.load_default)
    columns = max(len(_legend()), *(frame.columns for frame in frames))
    height = max(len(frame.rows) for frame in frames) + 1
    first, *rest = [_drawn(frame, columns, height, font) for frame in frames]
    times = [round(1000 * max(seconds, SHORTEST))] * len(frames)
    times[-1] += round(1000 * HOLD)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=times, loop=0)


def _font(truetype: Any, default: Any) -> "ImageFont.FreeTypeFont":
    for name in FONTS:
        try:
            return truetype(name, SIZE)
        except OSError:
            continue
    return default(SIZE)


def _drawn(frame: Panel, columns: int, height: int, font: "ImageFont.FreeTypeFont") -> "Image.Image":
    from PIL import Image, ImageDraw

    cell, line = math.ceil(font.getlength("0")), SIZE + 4
    image = Image.new("RGB", (2 * MARGIN + columns * cell, round(2 * MARGIN + (height + 1.5) * line)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    heading = wrap([(frame.heading, Style.PLAIN)], columns)[0]
    for y, row in [*enumerate([heading, *frame.rows]), (height + 0.5, _legend())]:
        x = 0
        for cluster in row:
            at = (MARGIN + x * cell, MARGIN + y * line)
            draw.text(at, cluster.text, COLOURS[cluster.style], font)
            x += cluster.cells
    return image.quantize(64)


# HTML


def page(shown: Recording, seconds: float) -> str:
    """One HTML page that needs nothing else: the canvas by step, its entropies, and their course."""
    values = {
        "title": escape(f"{shown.header.model}: a trace"),
        "data": json.dumps(_data(shown, seconds), separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub("@(title|data)@", lambda match: values[match[1]], PAGE)


def _data(shown: Recording, seconds: float) -> dict[str, Any]:
    """What the page draws. A step's `words` index the page's; its `states` are a letter a token: a, c or r."""
    words: dict[str, int] = {}
    # Without ends, special tokens and bytes there is one piece for each position.
    bare = CanvasText(cast(Tokenizer, Spellings({})), ())
    steps = []
    for step, before in shown.steps:
        texts = _texts(step.best.tolist(), shown.tokenizer)
        steps.append(
            {
                "block": step.block,
                "step": step.step,
                "temperature": round(step.temperature, 4),
                "mean": _finite(step.mean_entropy),
                "words": [words.setdefault(text, len(words)) for text in texts],
                "states": "".join(_STATES[style] for _, style in bare.pieces(step, before)),
                "entropy": [_finite(nats) for nats in step.entropy.tolist()],
                "accepted": int(step.accepted.sum()),
                "kept": len(CanvasText(shown.tokenizer, shown.ends).kept(step)),
            }
        )
    blocks = 1 + max((step.block for step, _ in shown.steps), default=-1)
    header = shown.header
    about = (header.model, f"seed {header.seed}", f"canvas {header.canvas_length}", f"vocabulary {header.vocab_size}")
    return {
        "about": " · ".join(about),
        "prompt": shown.tokenizer.decode(header.prompt_tokens),
        "words": list(words),
        "steps": steps,
        "settled": [shown.settled(block) for block in range(blocks)],
        "text": shown.settled(len(shown.events)),
        "canvas": header.canvas_length,
        "most": round(math.log(max(2, header.vocab_size)), 4),
        "seconds": max(seconds, SHORTEST),
    }


def _texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What stands at each position; a character of several bytes stands at its first one."""
    texts: list[str] = []
    for byte, run in groupby(ids, key=tokenizer.byte_ids.__contains__):
        own = list(run)
        if byte:
            texts += [tokenizer.decode(own), *[""] * (len(own) - 1)]
        else:
            texts += [SPECIAL if i in tokenizer.special_ids else tokenizer.decode([i]) for i in own]
    return texts


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title@</title>
<style>
:root { color-scheme: light dark; --back: #fbfbf9; --text: #22252a; --faint: #70757d; --line: #dcdcd6;
  --a: #20702c; --c: #96600a; --r: #7b53a4; --heat: 220, 70, 40; --mark: #2f6fd0 }
@media (prefers-color-scheme: dark) { :root { --back: #1d1f22; --text: #dadcd8; --faint: #969b9f; --line: #3b3e42;
  --a: #a5c85c; --c: #ecc04c; --r: #b796db; --heat: 240, 90, 60; --mark: #6fa8ff } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.25rem; margin: 0 }
p, summary, figcaption { color: var(--faint); margin: .3rem 0 }
pre { font: 15px/1.6 ui-monospace, Menlo, Consolas, monospace; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere }
#text { border: 1px solid var(--line); border-radius: 6px; padding: 1rem; min-height: 6rem; margin: .5rem 0 }
#text span { border-radius: 2px; background: rgba(var(--heat), var(--h, 0)) }
.a { color: var(--a); font-weight: 600 }
.c { color: var(--c); text-decoration: underline }
.r { color: var(--r); font-style: italic }
#text .beyond { opacity: .3 }
.plain span { --h: 0 !important }
#bar { display: flex; gap: .75rem; align-items: center }
#bar input[type=range] { flex: 1; min-width: 6rem }
button { font: inherit; width: 5rem }
#legend > * { margin-right: 1.2rem }
#scale { padding: 0 .6rem; background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .7)) }
figure { margin: 1rem 0 0 }
figure svg { width: 100%; height: 6rem; border-bottom: 1px solid var(--line); cursor: pointer; display: block }
polyline { fill: none; stroke: var(--text); stroke-width: 1.5 }
line, polyline { vector-effect: non-scaling-stroke }
.border { stroke: var(--line) }
.now { stroke: var(--mark); stroke-width: 2 }
</style>
</head>
<body>
<h1>@title@</h1>
<p id="about"></p>
<details><summary>prompt</summary><pre id="prompt"></pre></details>
<div id="moving">
<div id="bar"><button id="play" type="button">play</button>
<input id="at" type="range" min="0" value="0" aria-label="step"></div>
<p id="status" aria-live="polite"></p>
</div>
<pre id="text"></pre>
<div id="measured">
<p id="legend"><span class="a">accepted</span><span class="c">changed</span><span class="r">re-noised</span>
<label><input id="heat" type="checkbox" checked> entropy
<span id="scale">0 to <span id="most"></span> nats</span></label></p>
<figure><figcaption id="means"></figcaption>
<svg id="mean" viewBox="0 0 1000 100" preserveAspectRatio="none"></svg></figure>
<figure><figcaption id="counts"></figcaption>
<svg id="count" viewBox="0 0 1000 100" preserveAspectRatio="none"></svg></figure>
</div>
<script type="application/json" id="data">@data@</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), steps = data.steps, last = steps.length - 1;
let at = 0, timer = 0;

const x = i => last ? 1000 * i / last : 500;

function put(svg, kind, attributes) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  return svg.appendChild(shape);
}

function upright(svg, i, kind) {
  return put(svg, "line", {x1: x(i), x2: x(i), y1: 0, y2: 100, class: kind});
}

function chart(id, values, most) {
  const svg = $(id);
  steps.forEach((step, i) => { if (i && step.block !== steps[i - 1].block) upright(svg, i, "border"); });
  put(svg, "polyline", {points: values.map((value, i) => `${x(i)},${97 - 94 * (value ?? 0) / most}`).join(" ")});
  upright(svg, 0, "now");
  svg.addEventListener("click", event => {
    const box = svg.getBoundingClientRect();
    show(Math.round(last * (event.clientX - box.left) / box.width));
  });
}

function show(i) {
  at = Math.max(0, Math.min(last, i));
  const step = steps[at];
  $("at").value = at;
  $("status").textContent = `block ${step.block + 1} · step ${step.step} · T ${step.temperature.toFixed(2)}`
    + ` · H ${step.mean === null ? "?" : step.mean.toFixed(3)} · ${step.accepted} of ${data.canvas} accepted`;
  const spans = step.words.map((word, place) => {
    const span = document.createElement("span"), nats = step.entropy[place];
    span.textContent = data.words[word];
    span.className = step.states[place] + (place < step.kept ? "" : " beyond");
    span.title = `position ${place} · ${nats ?? "?"} nats`;
    span.style.setProperty("--h", (0.7 * Math.sqrt(Math.max(0, nats ?? 0) / data.most)).toFixed(3));
    return span;
  });
  $("text").replaceChildren(data.settled[step.block], ...spans);
  for (const line of document.querySelectorAll(".now"))
    for (const end of ["x1", "x2"]) line.setAttribute(end, x(at));
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => at < last ? show(at + 1) : play(false), 1000 * data.seconds) : 0;
  $("play").textContent = on ? "pause" : "play";
}

$("about").textContent = data.about;
$("prompt").textContent = data.prompt;
$("most").textContent = data.most.toFixed(1);
if (steps.length) {
  const highest = Math.max(...steps.map(step => step.mean ?? 0));
  $("means").textContent = `mean entropy, 0 to ${highest.toFixed(3)} nats`;
  $("counts").textContent = `accepted tokens, 0 to ${data.canvas}`;
  chart("mean", steps.map(step => step.mean), highest || 1);
  chart("count", steps.map(step => step.accepted), data.canvas);
  $("at").max = last;
  $("at").addEventListener("input", event => { play(false); show(Number(event.target.value)); });
  $("play").addEventListener("click", () => { if (!timer && at === last) show(0); play(!timer); });
  $("heat").addEventListener("change", event => $("text").classList.toggle("plain", !event.target.checked));
  document.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by && event.target !== $("at")) { play(false); show(at + by); }
  });
  show(0);
} else {
  $("moving").hidden = $("measured").hidden = true;
  $("text").textContent = data.text;
}
</script>
</body>
</html>
"""
