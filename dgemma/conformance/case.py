"""Cases and their golden results in files, and what an engine gave beside them. It needs no torch.

An outcome is an ordered dict from places, such as "row 0 block 1 step 3 canvas", to arrays.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dgemma.conformance.adapter import Answer, Encoded, Prompt, Recorded, Request
from dgemma.picture import Patches, Placed

FORMAT, VERSION = "dgemma-conformance", 1
DATA = Path(__file__).parent / "data"
TOLERANCE = 3e-4
"""Largest difference of real numbers, as a share of their root mean square, or of 1 if that is less."""
OPTIONAL = ("keys", "values", "entropy", "converged")
"""What an engine need not show."""

Outcome = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What an engine is asked, and what is right.

    kind: "encode", "generate", or "memory", which has no values: encoding its prompt may hold no array of more than
    `most` elements. wrong: for each trap the first places where it differs, with its values there.
    """

    name: str
    about: str
    checkpoint: str
    kind: str
    prompts: tuple[Prompt, ...]
    shared: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    most: int = 0
    noise: tuple[Recorded, ...] = ()
    canvas: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    previous: np.ndarray | None = None
    golden: Outcome = field(default_factory=dict)
    wrong: dict[str, Outcome] = field(default_factory=dict)

    @property
    def requests(self) -> list[Request]:
        return [Request(prompt, self.options, noise) for prompt, noise in zip(self.prompts, self.noise, strict=True)]


def encoded_outcome(rows: Sequence[Encoded]) -> Outcome:
    found: Outcome = {}
    for r, row in enumerate(rows):
        for layer, (keys, values) in enumerate(zip(row.keys, row.values, strict=True)):
            found[f"row {r} layer {layer} keys"] = np.asarray(keys, np.float32)
            found[f"row {r} layer {layer} values"] = np.asarray(values, np.float32)
        found[f"row {r} logits"] = np.asarray(row.logits, np.float32)
    return found


def answer_outcome(answers: Sequence[Answer]) -> Outcome:
    found: Outcome = {}
    for r, answer in enumerate(answers):
        for b, block in enumerate(answer.blocks):
            at = f"row {r} block {b}"
            for s in range(len(block.best)):
                if block.entropy is not None:
                    found[f"{at} step {s + 1} entropy"] = np.asarray(block.entropy[s], np.float32)
                found[f"{at} step {s + 1} best"] = np.asarray(block.best[s], np.int32)
                found[f"{at} step {s + 1} canvas"] = np.asarray(block.canvas[s], np.int32)
            found[f"{at} steps"] = np.array([len(block.best)], np.int32)
            if block.converged is not None:
                found[f"{at} converged"] = np.array([block.converged], np.int32)
        found[f"row {r} blocks"] = np.array([len(answer.blocks)], np.int32)
        found[f"row {r} tokens"] = np.asarray(answer.tokens, np.int32)
    return found


@dataclass(frozen=True)
class Difference:
    """The first place where two outcomes differ."""

    place: str
    found: np.ndarray | None
    told: str


def first_difference(golden: Outcome, found: Outcome) -> Difference | None:
    """In the golden outcome's order. What an engine shows nowhere in the case, and need not show, is passed over."""
    shown = {place.rsplit(" ", 1)[1] for place in found}
    for place, right in golden.items():
        what = place.rsplit(" ", 1)[1]
        if what in OPTIONAL and what not in shown:
            continue
        if place not in found:
            return Difference(place, None, "is not there")
        if told := differing(right, found[place]):
            return Difference(place, found[place], told)
    return None


def differing(right: np.ndarray, found: np.ndarray) -> str:
    """How two arrays differ, in words; nothing if they are equal, or real and close."""
    if right.shape != found.shape:
        return f"has shape {list(found.shape)}, not {list(right.shape)}"
    if right.size == 0:
        return ""
    if np.issubdtype(right.dtype, np.integer):
        wrong = np.argwhere(right != found)
        if not len(wrong):
            return ""
        at = tuple(wrong[0])
        where = f" at {at[0]}" if right.size > 1 else ""
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"is {found[at]} instead of {right[at]}{where}{more}"
    scale = max(1.0, float(np.sqrt(np.mean(np.square(right, dtype=np.float64)))))
    off = np.abs(found.astype(np.float64) - right)
    off[~np.isfinite(off)] = np.inf
    at = np.unravel_index(off.argmax(), off.shape)
    if off[at] <= TOLERANCE * scale:
        return ""
    return (
        f"is off by {off[at] / scale:.1e} at {', '.join(map(str, map(int, at)))}: {found[at]:.5g} for {right[at]:.5g}"
    )


# ---- files


def write(case: Case, folder: Path) -> None:
    """NAME.json: what is asked, in words and small numbers; NAME.safetensors: noise, pictures and outcomes."""
    tensors: dict[str, np.ndarray] = {}
    prompts = []
    for r, prompt in enumerate(case.prompts):
        pictures = []
        for i, p in enumerate(prompt.pictures):
            tensors[f"row {r} picture {i}"] = p.picture.patches
            pictures.append({"begin": p.begin, "end": p.end, "rows": p.picture.rows, "columns": p.picture.columns})
        prompts.append({"pieces": prompt.pieces, **({"pictures": pictures} if pictures else {})})
    for r, noise in enumerate(case.noise):
        tensors |= {f"row {r} {name}": array for name, array in asdict(noise).items()}
    if case.kind != "generate":
        tensors["canvas"] = case.canvas
    if case.previous is not None:
        tensors["previous"] = case.previous
    tensors |= _stacked("golden", case.golden)
    for trap, outcome in case.wrong.items():
        tensors |= {f"wrong/{trap}/{place}": array for place, array in outcome.items()}
    values = {"format": FORMAT, "version": VERSION, "about": case.about, "checkpoint": case.checkpoint}
    values |= {"kind": case.kind, "prompts": prompts}
    values |= {name: getattr(case, name) for name in ("shared", "options", "most") if getattr(case, name)}
    (folder / f"{case.name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    small = {name: _narrowed(array) for name, array in tensors.items()}
    save_file({name: small[name] for name in sorted(small)}, folder / f"{case.name}.safetensors")


def read(path: Path) -> Case:
    """A case from its JSON file and the tensors beside it. ValueError for another format or version."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        told = f"{values.get('format')!r} version {values.get('version')!r}"
        raise ValueError(f"{path} is {told}, not {FORMAT!r} version {VERSION}")
    tensors = {name: _widened(array) for name, array in load_file(path.with_suffix(".safetensors")).items()}
    prompts = []
    for r, given in enumerate(values["prompts"]):
        pictures = tuple(
            Placed(Patches(tensors[f"row {r} picture {i}"], p["rows"], p["columns"]), p["begin"], p["end"])
            for i, p in enumerate(given.get("pictures", ()))
        )
        prompts.append(Prompt(tuple(map(tuple, given["pieces"])), pictures))
    noise: tuple[Recorded, ...] = ()
    if values["kind"] == "generate":
        noise = tuple(
            Recorded(*(tensors[f"row {r} {name}"] for name in ("canvas", "renoise", "uniform")))
            for r in range(len(prompts))
        )
    wrong: dict[str, Outcome] = {}
    for name, array in tensors.items():
        if name.startswith("wrong/"):
            _, trap, place = name.split("/")
            wrong.setdefault(trap, {})[place] = array
    return Case(
        path.stem,
        values["about"],
        values["checkpoint"],
        values["kind"],
        tuple(prompts),
        values.get("shared", 0),
        values.get("options", {}),
        values.get("most", 0),
        noise,
        tensors.get("canvas", np.empty(0, np.int64)),
        tensors.get("previous"),
        dict(_unstacked({n: a for n, a in tensors.items() if n.startswith("golden/")})),
        wrong,
    )


def cases(data: Path = DATA) -> list[Case]:
    """All cases, by name."""
    return [read(path) for path in sorted((data / "cases").glob("*.json"))]


def _stacked(prefix: str, outcome: Outcome) -> dict[str, np.ndarray]:
    """A block's steps in one array each: headers are larger than a step."""
    steps: dict[str, list[np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for place, array in outcome.items():
        at, step, rest = place.partition(" step ")
        if step:
            steps.setdefault(f"{prefix}/{at} {rest.split()[1]}", []).append(array)
        else:
            whole[f"{prefix}/{place}"] = array
    return whole | {name: np.stack(arrays) for name, arrays in steps.items()}


def _unstacked(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Places in the order in which an engine comes to them."""
    found = {name.removeprefix("golden/"): array for name, array in tensors.items()}
    rows = sum(1 for name in found if name.endswith((" logits", " tokens")))
    for r in range(rows):
        layers = sum(1 for name in found if name.startswith(f"row {r} layer ") and name.endswith(" keys"))
        for place in [f"row {r} layer {i} {what}" for i in range(layers) for what in ("keys", "values")]:
            yield place, found[place]
        if f"row {r} logits" in found:
            yield f"row {r} logits", found[f"row {r} logits"]
            continue
        for b in range(int(found[f"row {r} blocks"][0])):
            at = f"row {r} block {b}"
            for s in range(int(found[f"{at} steps"][0])):
                for what in ("entropy", "best", "canvas"):
                    yield f"{at} step {s + 1} {what}", found[f"{at} {what}"][s]
            yield f"{at} steps", found[f"{at} steps"]
            yield f"{at} converged", found[f"{at} converged"]
        yield f"row {r} blocks", found[f"row {r} blocks"]
        yield f"row {r} tokens", found[f"row {r} tokens"]


def _narrowed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(np.int16) if array.dtype in (np.int64, np.int32) else array)


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype == np.int16 else array
