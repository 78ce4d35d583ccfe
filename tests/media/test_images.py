"""Images to patches, against the reference's processor; and what is refused."""

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from dgemma.config import BUDGETS, VisionConfig
from dgemma.media.images import MAX_PIXELS, fitted, open_image, picture_of, soft_tokens
from tests.parity.reference import VISION

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
gemma = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4", reason="the reference is absent")

CONFIG = VisionConfig.from_dict(
    VISION | {"patch_size": 16, "standardize": False, "use_clipped_linears": False, "position_embedding_size": 10240}
)


def saved(image: "Image.Image", format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> "Image.Image":
    channels = {"RGB": 3, "RGBA": 4, "LA": 2, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, height * width * channels, np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def sizes() -> list[tuple[int, int]]:
    rng = random.Random(0)
    found = [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (48, 48), (768, 768), (512, 512), (1080, 1920), (3, 100_000)]
    found += [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(250)]
    found += [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(60)]
    found += [(rng.randint(1, 30), rng.randint(1000, 100_000)) for _ in range(60)]
    return found + [(width, height) for height, width in found[-60:]]


@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes_equal_the_reference(budget):
    for height, width in sizes():
        wanted = gemma.get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        assert fitted(height, width, budget, CONFIG) == wanted, (height, width)
        assert soft_tokens(height, width, budget, CONFIG) == wanted[0] * wanted[1] // 48**2 <= budget


def test_the_sizes_that_the_release_is_known_by():
    assert fitted(512, 512, 280, CONFIG) == (768, 768)
    assert soft_tokens(512, 512, 280, CONFIG) == 256
    assert fitted(1080, 1920, 280, CONFIG) == (576, 1056)
    assert soft_tokens(1080, 1920, 280, CONFIG) == 264


def assert_as_the_reference(image: "Image.Image", data: bytes | None = None, budget: int = 70) -> None:
    """`image`, whatever its mode, through the reference's processor; ours from the file."""
    processor = gemma.Gemma4ImageProcessorPil(max_soft_tokens=budget)
    wanted = processor(image, return_tensors="np")
    ours = picture_of(open_image(data or saved(image), "it"), budget, CONFIG)
    count = wanted["num_soft_tokens_per_image"][0]
    assert len(ours.patches) == count * 9
    # Two roundings to 8 bits are all that may lie between them.
    assert np.abs(ours.patches / 255 - wanted["pixel_values"][0][: count * 9]).max() <= 1.01 / 255
    y, x = np.divmod(np.arange(count * 9), ours.columns)
    assert (wanted["image_position_ids"][0][: count * 9] == np.stack((x, y), -1)).all()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (48, 48), (33, 47), (640, 360), (1200, 1700), (5, 3), (384, 384)]
)
def test_pixels_equal_the_reference(size):
    for budget in (70, 280) if size[0] < 700 else (70,):
        assert_as_the_reference(noise(*size), budget=budget)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
def test_other_modes_equal_the_reference(mode):
    image = noise(90, 70, mode=mode if mode in ("L", "LA", "RGBA") else "RGB")
    assert_as_the_reference(image if image.mode == mode else image.convert(mode))


def test_cmyk_and_formats_equal_the_reference():
    for image, format in ((noise(80, 60, mode="CMYK"), "JPEG"), (noise(80, 60), "JPEG"), (noise(80, 60), "BMP")):
        data = saved(image, format)
        assert_as_the_reference(Image.open(io.BytesIO(data)), data)
    for format in ("WEBP", "TIFF", "GIF"):
        data = saved(noise(80, 60).quantize(30) if format == "GIF" else noise(80, 60), format)
        assert_as_the_reference(Image.open(io.BytesIO(data)), data)


def test_a_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (60, 40), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 30, 40))
    data = saved(image, transparency=0)
    assert_as_the_reference(Image.open(io.BytesIO(data)), data)
    assert open_image(data, "it").getpixel((5, 5)) == (255, 255, 255)
    assert open_image(data, "it").getpixel((50, 5)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_upright(orientation):
    """The reference's loader turns it, before its processor."""
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(noise(70, 30), "PNG", exif=exif)
    upright = load_image(Image.open(io.BytesIO(data)))
    assert upright.size == ((70, 30) if orientation < 5 else (30, 70))
    assert_as_the_reference(upright, data)


def test_sixteen_bits_become_eight():
    wide = np.linspace(0, 65535, 4000).astype(np.uint16).reshape(50, 80)
    data = saved(Image.fromarray(wide))
    ours = np.asarray(open_image(data, "it"))[..., 0]
    assert np.abs(ours - wide / 257).max() <= 0.51
    with pytest.raises(ValueError, match="it has 32 bits a pixel"):
        open_image(saved(Image.fromarray(wide.astype(np.float32)), "TIFF"), "it")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_is_taken(format):
    first, second = Image.new("RGB", (40, 30), (200, 10, 10)), Image.new("RGB", (40, 30), (10, 10, 200))
    data = saved(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    red, _, blue = open_image(data, "it").getpixel((20, 15))
    assert red > 150 > blue


def test_a_path_and_an_open_image_are_the_same(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(saved(noise(50, 40)))
    pictures = [picture_of(open_image(each, "it"), 70, CONFIG) for each in (path, str(path), noise(50, 40))]
    assert len({picture.digest for picture in pictures}) == 1
    with pytest.raises(OSError, match="No such file"):
        open_image(tmp_path / "b.png", "it")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few KB that claims, and holds, so many black pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    rows = b"\0" * (width // 8 + 1) * 100
    body = b"".join(packer.compress(rows) for _ in range(height // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")  # pillow's own, before our error
@pytest.mark.parametrize("side", [9000, 12_000, 30_000])
def test_bombs_are_refused_by_their_header(side):
    assert side**2 > MAX_PIXELS
    with pytest.raises(ValueError, match=r"it has .* pixels"):
        open_image(bomb(side, side), "it")


def test_a_bomb_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(13_000, 13_000))
    code = (
        "import resource, sys\nfrom dgemma.media.images import open_image\nimport PIL.PngImagePlugin, PIL.ImageOps\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    open_image(sys.argv[1], 'it')\nexcept ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    told, grown = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True).splitlines()
    assert "13000 × 13000 pixels" in told
    assert int(grown) < 40_000, "KiB, of the 500,000 that it would take"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_are_told(format):
    image = noise(200, 150)
    data = saved(image.quantize(200) if format == "GIF" else image, format)
    for cut in (len(data) // 2, len(data) * 9 // 10, 40):
        with pytest.raises(ValueError, match=r"^photo\.x "):
            open_image(data[:cut], "photo.x")


def test_what_is_no_image_is_told():
    for data in (b"", b"hello", b"%PDF-1.7 ...", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 99):
        with pytest.raises(ValueError, match="it is not an image of a known format"):
            open_image(data, "it")
    with pytest.raises(ValueError, match="each must be at least 1"):
        fitted(0, 5, 70, CONFIG)


@pytest.mark.filterwarnings("ignore")  # pillow's, of what is damaged but can be read
def test_random_damage_never_escapes():
    """Whatever a decoder meets: an image, or a ValueError that names it."""
    rng = random.Random(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = saved(noise(40, 30).quantize(9) if format == "GIF" else noise(40, 30), format)
        for _ in range(60):
            spoiled = bytearray(data)
            for _ in range(rng.randint(1, 12)):
                spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
            try:
                told = f"it is {open_image(bytes(spoiled), 'it').mode}"
            except ValueError as error:
                told = str(error)
            assert told.startswith("it ")
