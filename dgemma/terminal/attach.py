"""Files that go along with a user's message: as parts of it, before its text, here or as data URLs to a server."""

import base64
import mimetypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dgemma.config import MediaConfig
from dgemma.flags import UsageError

Part = dict[str, Any]
Content = str | Sequence[Part]


def attached(images: Iterable[Path], videos: Iterable[Path]) -> list[Part]:
    """A part for each file. OSError for one that is not there."""
    parts: list[Part] = [{"type": "image", "image": path} for path in images]
    parts += [{"type": "video", "video": path} for path in videos]
    for part in parts:
        path = part[part["type"]]
        if not path.is_file():
            raise FileNotFoundError(f"there is no {part['type']} file {path}")
    return parts


def attachments(
    images: Sequence[Path] | None, videos: Sequence[Path] | None, media: dict[str, Any], later: bool = False
) -> list[Part]:
    """The parts of a message that show files; UsageError for a file that is not there or an option without effect.

    later: there may still come others.
    """
    try:
        MediaConfig(**media)
        parts = attached(images or (), videos or ())
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    for name in media:
        flag, shown = ("--image", images) if name == "image_tokens" else ("--video", videos)
        if not (shown or later):
            raise UsageError(f"--{name.replace('_', '-')} has no effect without {flag}")
    return parts


def content_of(parts: Sequence[Part], text: str) -> Content:
    """What a user says: models of this family were taught with images before the text, if any, that is about them."""
    return [*parts, *([{"type": "text", "text": text}] if text.strip() else [])] if parts else text


def sendable(content: Content) -> Content:
    """The same for a server: files become data URLs."""
    return content if isinstance(content, str) else [_sendable(part) for part in content]


def _sendable(part: Part) -> Part:
    kind = part["type"]
    path = part.get(kind)
    if not isinstance(path, Path):
        return part
    type, _ = mimetypes.guess_type(path.name)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{type or f'{kind}/unknown'};base64,{data}"}}
