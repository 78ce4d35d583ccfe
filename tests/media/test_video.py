"""Frames of a video: which ones, at what second, and what is refused. Each frame's grey tells its number."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dgemma.media import video
from dgemma.media.video import MOST, frames

av = pytest.importorskip("av", reason="av is not installed")


def clip(
    times: Sequence[float], format: str = "matroska", codec: str = "ffv1", sound: bool = False, size: int = 32
) -> bytes:
    """A video whose frame at times[i] is all of the grey 4 i."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as out:
        stream = out.add_stream(codec, rate=1000)
        stream.width = stream.height = size
        stream.pix_fmt = pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            audio = out.add_stream("pcm_s16le", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.rate = 8000
            silence.pts = 0
            for packet in audio.encode(silence):
                out.mux(packet)
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 4 * i % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(at * 1000), Fraction(1, 1000)
            for packet in stream.encode(frame.reformat(format=pixels)):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()


def numbers(found: Sequence[tuple[float, object]]) -> list[int]:
    """Which frames they are: greys lose a little on the way through YUV."""
    return [round(float(np.asarray(image).mean()) / 4) for _, image in found]


def test_what_is_seen_at_each_second():
    found = frames(clip([i / 4 for i in range(15)]), "it")
    assert [second for second, _ in found] == [0, 1, 2, 3]
    assert numbers(found) == [0, 4, 8, 12]


def test_uneven_frames_are_taken_by_their_times():
    found = frames(clip([0, 0.9, 1.1, 1.2, 4.5, 4.6, 5.0]), "it")
    assert [second for second, _ in found] == [0, 1, 2, 3, 4, 5]
    assert numbers(found) == [0, 1, 3, 3, 3, 6]


def test_a_clip_that_begins_late_counts_from_its_first_frame():
    found = frames(clip([5 + i / 2 for i in range(6)]), "it")
    assert [second for second, _ in found] == [0, 1, 2]
    assert numbers(found) == [0, 2, 4]


@pytest.mark.parametrize(("count", "have"), [(5, 23), (32, 40), (3, 3), (8, 4), (1, 9)])
def test_a_number_of_frames_is_spread_over_the_clip(count, have):
    times = [i / 10 for i in range(have)]
    found = frames(clip(times), "it", count)
    wanted = [i * have // count for i in range(count)] if count < have else list(range(have))
    assert numbers(found) == wanted
    assert [second for second, _ in found] == pytest.approx([times[i] for i in wanted], abs=2e-3)


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("avi", "mjpeg"), ("mpegts", "mpeg4")],
)
def test_containers_and_codecs(format, codec, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = tmp_path / f"clip.{format}"
    path.write_bytes(clip([i / 10 for i in range(25)], format, codec, size=64))
    found = frames(path, "it")
    assert [second for second, _ in found] == [0, 1, 2]
    assert np.abs(np.array(numbers(found)) - [0, 10, 20]).max() <= 1


def test_sound_is_no_matter_and_no_pictures_are_told():
    assert numbers(frames(clip([0, 0.5, 1], sound=True), "it")) == [0, 2]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        audio = out.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.rate, silence.pts = 8000, 0
        for packet in audio.encode(silence):
            out.mux(packet)
    with pytest.raises(ValueError, match="it has no video stream"):
        frames(file.getvalue(), "it")


def test_limits(monkeypatch):
    long = clip([10 * i for i in range(8)])
    with pytest.raises(ValueError, match=r"it lasts 70 s, .* at most 60.*video_frames"):
        frames(long, "it")
    assert numbers(frames(long, "it", 4)) == [0, 2, 4, 6]
    assert len(frames(clip([2 * i for i in range(30)]), "it")) == 59 < MOST
    with pytest.raises(ValueError, match="must lie in 1 … 60"):
        frames(long, "it", 61)
    with monkeypatch.context() as few:
        few.setattr(video, "DECODED", 8000)
        with pytest.raises(ValueError, match="it has 8 frames of 1024 pixels, too many"):
            frames(long, "it", 4)
    monkeypatch.setattr(video, "LONGEST", 50)
    with pytest.raises(ValueError, match="it lasts 70 s; at most 50"):
        frames(long, "it", 4)
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="it has 32 × 32 pixels a frame; at most 1000"):
        frames(long, "it", 4)
    monkeypatch.setattr(video, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"it has \d+ bytes; at most 1000"):
        frames(long, "it", 4)


def assert_told(data: bytes) -> None:
    """Frames, or an error that names their file."""
    try:
        found = frames(data, "it")
    except ValueError as error:
        told = str(error)
    else:
        told = f"it has {len(found)} frames"
    assert told.startswith("it ")


def test_damage_is_told():
    data = clip([i / 4 for i in range(15)], "mp4", "mpeg4", size=64)
    for spoiled in (b"", b"hello", data[: len(data) // 2], data[:200], bytes(len(data))):
        with pytest.raises(ValueError, match=r"^it "):
            frames(spoiled, "it")
    # The frames' own bytes, not the container's.
    whole = clip([i / 4 for i in range(15)], "matroska", "mjpeg", size=64)
    rng = np.random.default_rng(0)
    for _ in range(20):
        spoiled = bytearray(whole)
        for at in rng.integers(200, len(whole), 60):
            spoiled[at] = rng.integers(256)
        assert_told(bytes(spoiled))


def test_a_playlist_opens_nothing(tmp_path):
    """A container that names other files would read them for whoever sent it."""
    inner = tmp_path / "inner.ts"
    inner.write_bytes(clip([0, 0.5, 1], "mpegts", "mpeg4", size=64))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{inner}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{inner}'\n"
    for text, name in ((playlist, "a.m3u8"), (concat, "a.ffconcat")):
        path: Path = tmp_path / name
        path.write_text(text)
        for source in (path, text.encode()):
            with pytest.raises(ValueError, match="it is not a video"):
                frames(source, "it")


def test_a_clip_held_sideways_is_upright():
    """The container's display matrix, which a phone writes."""

    class Turned:
        rotation = 90

        def to_image(self):
            image = pytest.importorskip("PIL.Image")
            wide = image.new("RGB", (40, 20), (0, 0, 0))
            wide.paste((250, 0, 0), (0, 0, 20, 20))
            return wide

    upright = video._image(Turned())
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 35))[0] == 250, "turned counterclockwise, its left is below"
