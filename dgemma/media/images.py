"""An image file to patches: opened within limits, upright, in RGB, resized to a budget of soft tokens.

Source: the released processor_config.json, and transformers' models/gemma4 for the sizes.
"""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.config import VisionConfig
from dgemma.media import needed
from dgemma.picture import Patches

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is opened: pillow also knows formats that run other programs, or that nobody sends as a picture."""
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
"""Beyond it an image is refused by its header: decoded it would take 3 bytes a pixel, and twice that on the way."""


def fitted(height: int, width: int, budget: int, config: VisionConfig) -> tuple[int, int]:
    """The height and width in pixels that an image is resized to, larger or smaller, for at most `budget` soft tokens.

    Both are multiples of a soft token's side; the ratio stays as far as that allows. ValueError for no pixels.
    """
    if min(height, width, budget) < 1:
        raise ValueError(f"an image of {width} × {height} pixels for {budget} soft tokens: each must be at least 1")
    side = config.patch_size * config.pooling_kernel_size
    scale = math.sqrt(budget * side**2 / (height * width))
    rows, columns = math.floor(scale * height / side), math.floor(scale * width / side)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * side, columns * side


def soft_tokens(height: int, width: int, budget: int, config: VisionConfig) -> int:
    """Soft tokens of an image of this size."""
    side = config.patch_size * config.pooling_kernel_size
    rows, columns = fitted(height, width, budget, config)
    return rows * columns // side**2


def picture_of(image: "Image", budget: int, config: VisionConfig) -> Patches:
    """The patches of an RGB image, bicubic with antialias where its size changes."""
    import numpy as np  # not above: a command's --help need not wait for it

    resampling = needed("PIL.Image").Resampling.BICUBIC
    height, width = fitted(image.height, image.width, budget, config)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), resampling)
    patch = config.patch_size
    rows, columns = height // patch, width // patch
    pixels = np.asarray(image).reshape(rows, patch, columns, patch, 3)
    return Patches(pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1), rows, columns)


@dataclass(frozen=True, eq=False)
class FilePicture:
    """A Picture that is read from its file when it is needed: many of them take no memory."""

    path: Path
    budget: int
    config: VisionConfig
    rows: int
    columns: int
    digest: bytes

    @classmethod
    def of(cls, path: Path, name: str, budget: int, config: VisionConfig) -> "FilePicture":
        """Reads the file once, so that one that is damaged is told now; errors as those of `open_image`."""
        held = picture_of(open_image(path, name), budget, config)
        return cls(path, budget, config, held.rows, held.columns, held.digest)

    @property
    def patches(self) -> "np.ndarray":
        """ValueError if the file is not what it was."""
        held = picture_of(open_image(self.path, str(self.path)), self.budget, self.config)
        if held.digest != self.digest:
            raise ValueError(f"{self.path} has changed since it was first read")
        return held.patches


def open_image(source: "bytes | str | os.PathLike[str] | Image", name: str) -> "Image":
    """An image, upright and in RGB: a file's bytes, its path, or a pillow image; the first frame of several.

    Transparency is laid on white; 16 bits of grey become 8. ValueError, which `name` begins, for what is no image of
    FORMATS, is damaged, or exceeds MAX_BYTES or MAX_PIXELS; OSError for a file that cannot be read.
    """
    pillow = needed("PIL.Image")
    if isinstance(source, bytes):
        data = source
        _check_bytes(len(data), name)
    elif not isinstance(source, str | os.PathLike):
        return _upright_rgb(source, name)
    else:
        with open(source, "rb") as file:
            _check_bytes(os.fstat(file.fileno()).st_size, name)
            data = file.read(MAX_BYTES + 1)
            _check_bytes(len(data), name)
    try:
        opened = pillow.open(io.BytesIO(data), formats=FORMATS)
    except pillow.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{name} is not an image of a known format ({known})") from None
    except pillow.DecompressionBombError:
        raise ValueError(f"{name} has more than {MAX_PIXELS} pixels; make it smaller") from None
    except Exception as error:  # whatever a decoder meets in a stranger's file
        raise ValueError(f"{name} is a damaged image: {error}") from None
    with opened:
        return _upright_rgb(opened, name)


def _upright_rgb(image: "Image", name: str) -> "Image":
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name} has {image.width} × {image.height} pixels; at most {MAX_PIXELS} are taken")
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits a pixel: save it with 8 or 16")
    try:
        image.load()
        return _rgb(needed("PIL.ImageOps").exif_transpose(image))
    except Exception as error:  # as above
        raise ValueError(f"{name} is a damaged image: {error}") from None


def _rgb(image: "Image") -> "Image":
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    pillow = needed("PIL.Image")
    if image.mode.startswith("I;16"):
        import numpy as np

        # pillow would cut off everything above 255 and leave it white.
        wide = np.asarray(image).astype(np.uint32)
        return pillow.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes; at most {MAX_BYTES} are taken")
