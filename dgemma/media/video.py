"""Frames of a video and their times, with PyAV: one a second, or a number of them spread over the whole."""

import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dgemma.media import needed
from dgemma.media.images import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif"
"""Containers that hold their own frames: others, such as playlists, name files that would be opened too."""
MAX_BYTES = 1 << 30
SECONDS = 60
"""The longest clip of which a frame a second is taken, as the model was made for."""
LONGEST = 3600
"""Seconds of a clip of which a number of frames is taken: all of it is decoded."""
DECODED = 1 << 35
"""Pixels of all frames together: an hour of 640 × 360, or a minute of 4K at 60 frames a second."""
LOST = 1.0
"""Seconds that a frame may come late, since those before it could not be decoded, until the clip counts as damaged."""
MOST = 60
"""Frames at most, however they are chosen."""


def frames(source: bytes | str | os.PathLike[str], name: str, count: int = 0) -> list[tuple[float, "Image"]]:
    """Frames in RGB, each with the second at which it is seen, from the beginning of the clip.

    count 0: what is seen at each full second, of a clip of at most SECONDS. Otherwise `count` frames, spread evenly by
    their number, or all if there are fewer, each at its own time. Times are the stream's own, so frames of uneven
    lengths are no matter. ValueError, which `name` begins, for what is no video, is damaged or exceeds a limit.
    """
    av = needed("av")
    if not 0 <= count <= MOST:
        raise ValueError(f"a number of frames must lie in 1 … {MOST}, or be 0 for one a second, not {count}")
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes; at most {MAX_BYTES} are taken")
    try:
        times = _times(av, source, name)
        chosen = _chosen(times, count, name)
        return _decoded(av, source, name, [(times[index], at) for index, at in chosen])
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} is not a video, or a damaged one: {error.strerror or error}") from None
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # whatever a demuxer leaves unset in a stranger's file
        raise ValueError(f"{name} is a damaged video: {error}") from None


def _opened(av: Any, source: bytes | str | os.PathLike[str]) -> Any:
    # As a file object, so that a path is never taken for a URL or a device.
    file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115  closed by its user
    try:
        return file, av.open(file, mode="r", metadata_errors="replace", options={"format_whitelist": FORMATS})
    except BaseException:
        file.close()
        raise


def _times(av: Any, source: bytes | str | os.PathLike[str], name: str) -> list[float]:
    """When each frame is shown, in seconds from the first one, in order. Nothing is decoded."""
    file, container = _opened(av, source)
    with file, container:
        stream = _stream(container, name)
        base = stream.time_base
        found = [float(p.pts * base) for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        size = stream.width * stream.height
    if not found:
        raise ValueError(f"{name} has no frames")
    if len(found) * size > DECODED:
        raise ValueError(f"{name} has {len(found)} frames of {size} pixels, too many to decode: make it smaller")
    return sorted(found)


def _stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise ValueError(f"{name} has no video stream")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"{name} has {stream.width} × {stream.height} pixels a frame; at most {MAX_PIXELS} are taken")
    return stream


def _chosen(times: Sequence[float], count: int, name: str) -> list[tuple[int, float]]:
    """Numbers of frames, and the second that each is shown for."""
    length = times[-1] - times[0]
    if count:
        if length > LONGEST:
            raise ValueError(f"{name} lasts {length:.0f} s; at most {LONGEST} are taken")
        numbers = range(len(times)) if count >= len(times) else [i * len(times) // count for i in range(count)]
        return [(number, times[number] - times[0]) for number in numbers]
    if length >= SECONDS:
        raise ValueError(
            f"{name} lasts {length:.0f} s, and a frame a second is taken of at most {SECONDS}: cut it, or take a "
            "number of frames spread over it (video_frames)"
        )
    chosen, number = [], 0
    for second in range(int(length) + 1):
        while number + 1 < len(times) and times[number + 1] - times[0] <= second:
            number += 1
        chosen.append((number, float(second)))
    return chosen


def _decoded(
    av: Any, source: bytes | str | os.PathLike[str], name: str, wanted: Sequence[tuple[float, float]]
) -> list[tuple[float, "Image"]]:
    """The frames shown at these times, [(time in the stream, second)], in order."""
    found: list[tuple[float, Image]] = []
    file, container = _opened(av, source)
    with file, container:
        stream = _stream(container, name)
        for time, frame in _shown(container, stream):
            if frame.width * frame.height > MAX_PIXELS:
                raise ValueError(f"{name} has frames of {frame.width} × {frame.height} pixels")
            while len(found) < len(wanted) and 0 <= time + 1e-6 - wanted[len(found)][0] < LOST:
                found.append((wanted[len(found)][1], _image(frame)))
            if len(found) == len(wanted):
                return found
    raise ValueError(f"{name} is damaged: of {len(wanted)} frames that were chosen {len(found)} could be read")


def _shown(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    for frame in container.decode(stream):
        if frame.pts is not None:
            yield float(frame.pts * stream.time_base), frame


def _image(frame: Any) -> "Image":
    """Upright: a camera held on its side says so beside the frames."""
    image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0)) % 360
    return image.rotate(turned, expand=True) if turned else image
