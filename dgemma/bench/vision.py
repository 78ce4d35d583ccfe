"""`dgemma bench vision`: a photo's way to soft tokens, beside transformers with the same weights, in turns.

The tower has the released widths and fewer layers: what a layer costs is what counts. Both sides begin with the bytes
of a JPEG. Importing this imports no torch.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dgemma.bench.decode import DTYPES, OURS, THEIRS
from dgemma.bench.harness import Spread, cores, have_transformers, machine, versions
from dgemma.checkpoints import release
from dgemma.config import BUDGETS, VisionConfig

if TYPE_CHECKING:
    from dgemma.model.vision import VisionTower

SIZES = ((512, 512), (1080, 1920), (1600, 900), (480, 640))
"""Height and width of the photos."""
TEXT_HIDDEN = 2816


@dataclass(frozen=True)
class Side:
    """Seconds an image: from a JPEG to patches, from patches to soft tokens, and the latter of one shown twice."""

    prepare: Spread
    tower: Spread
    twice: Spread


@dataclass(frozen=True)
class Result:
    """ratios: transformers' times over this project's, turn by turn; distance: largest difference of soft tokens, as a
    share of their root mean square."""

    dtype: str
    layers: int
    budget: int
    threads: int
    repeats: int
    machine: str
    versions: dict[str, str]
    sides: dict[str, Side]
    ratios: dict[str, Spread]
    distance: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    layers: int = 2,
    budget: int = 280,
    dtype: str = "f32",
    repeats: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(map(str, BUDGETS))}, not {budget}")
    if min(layers, repeats) < 1:
        raise ValueError(f"layers and repeats must be at least 1, not {layers} and {repeats}")
    import torch

    from dgemma.model.vision import VisionTower

    torch.set_num_threads(threads or cores())
    config = replace(release.VISION, num_hidden_layers=layers)
    tower = _random(VisionTower(config, TEXT_HIDDEN)).to(getattr(torch, DTYPES[dtype])).eval()
    sides: dict[str, _Side] = {OURS: _Ours(tower, budget)}
    if have_transformers(progress):
        sides[THEIRS] = _Theirs(tower, budget)
    photos = _photos()
    seconds: dict[str, dict[str, list[float]]] = {n: {"prepare": [], "tower": [], "twice": []} for n in sides}
    soft: dict[str, Any] = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            progress(f"turn {turn} of {repeats}")
            for name, side in sides.items():
                began = perf_counter()
                prepared = side.prepare(photos)
                ready = perf_counter()
                soft[name] = side.encode(prepared)
                done = perf_counter()
                one = side.prepare([photos[0], photos[0]])
                between = perf_counter()
                side.encode(one)
                spent = ((ready - began) / len(photos), (done - ready) / len(photos), (perf_counter() - between) / 2)
                if turn:  # the first one warms up
                    for what, value in zip(seconds[name], spent, strict=True):
                        seconds[name][what].append(value)
    distance = None
    if THEIRS in soft:
        ours, theirs = (torch.cat(list(soft[name])).float() for name in (OURS, THEIRS))
        distance = float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
    return Result(
        dtype=dtype,
        layers=layers,
        budget=budget,
        threads=torch.get_num_threads(),
        repeats=repeats,
        machine=machine(),
        versions=versions(THEIRS in sides),
        sides={n: Side(**{what: Spread.of(values) for what, values in s.items()}) for n, s in seconds.items()},
        ratios={
            what: Spread.of([b / a for a, b in zip(values, seconds[THEIRS][what], strict=True)])
            for what, values in seconds[OURS].items()
            if THEIRS in seconds
        },
        distance=distance,
    )


class _Side:
    def prepare(self, photos: Sequence[bytes]) -> Any:
        """What the tower takes."""
        raise NotImplementedError

    def encode(self, prepared: Any) -> Any:
        """The soft tokens of all photos, in order."""
        raise NotImplementedError


class _Ours(_Side):
    def __init__(self, tower: "VisionTower", budget: int):
        self.tower, self.budget = tower, budget

    def prepare(self, photos: Sequence[bytes]) -> Any:
        from dgemma.media.images import open_image, picture_of

        return [picture_of(open_image(photo, "photo"), self.budget, self.tower.config) for photo in photos]

    def encode(self, prepared: Any) -> Any:
        return self.tower(prepared)


class _Theirs(_Side):
    """transformers as it comes, with the same weights."""

    def __init__(self, tower: "VisionTower", budget: int):
        from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling
        from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
        from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

        config = Gemma4VisionConfig(**_values(tower.config))
        weights = tower.state_dict()
        projection = weights.pop("embedding_projection.weight")
        self.tower = Gemma4VisionModel(config).to(projection.dtype).eval()
        names = {n: f"encoder.{n}" if n.startswith("layers.") else n for n in weights}
        self.tower.load_state_dict({names[n]: tensor for n, tensor in weights.items()})
        text: Any = type("Text", (), {"hidden_size": TEXT_HIDDEN})()
        self.project = modeling.DiffusionGemmaMultimodalEmbedder(config, text).to(projection.dtype)
        self.project.embedding_projection.weight.data = projection
        self.processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)

    def prepare(self, photos: Sequence[bytes]) -> Any:
        from PIL import Image

        opened: Any = [Image.open(io.BytesIO(photo)) for photo in photos]
        return self.processor(opened, return_tensors="pt")

    def encode(self, prepared: Any) -> Any:
        encoded = self.tower(prepared["pixel_values"], prepared["image_position_ids"])
        return self.project(encoded.last_hidden_state)[None]


def _values(config: VisionConfig) -> dict[str, Any]:
    """The released file's, for this many layers."""
    return {**config.source, "num_hidden_layers": config.num_hidden_layers}


def _random(tower: "VisionTower") -> "VisionTower":
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("q_norm.weight"):
                parameter.fill_(len(parameter) ** -0.5)
    return tower


def _photos() -> list[bytes]:
    """JPEGs of smooth colours with some grain, as photos are."""
    import numpy as np
    from PIL import Image

    rng, photos = np.random.default_rng(0), []
    for height, width in SIZES:
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (40 + 13 * c) + c) * np.cos(y / (60 + 7 * c)) for c in range(3)]
        pixels = 128 + 80 * np.stack(waves, -1) + rng.normal(0, 9, (height, width, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos
