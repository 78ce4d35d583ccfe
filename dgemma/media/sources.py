"""Where the bytes of an image or a video come from: a part of a message names a path, a data URL or an address."""

import base64
import binascii
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from dgemma.media.images import FilePicture
from dgemma.picture import Clip, Patches
from dgemma.text.messages import MEDIA

OPENED = (Patches, FilePicture, Clip)
MAX_REMOTE_BYTES = 32 << 20
SECONDS = 20.0
"""What a remote server may take, in all."""


@dataclass(frozen=True)
class Sources:
    """What may be read for a message.

    files: paths on this machine; hosts: names of servers whose http and https URLs are fetched, as host or host:port;
    none unless they are told. Redirects are refused: they would lead to where nobody allowed.
    """

    files: bool = True
    hosts: tuple[str, ...] = ()

    def bytes_of(self, given: Any, where: str) -> Any:
        """What `media.images` and `media.video` open: bytes, a path, or what is open already.

        given: a path, a URL, bytes, a pillow image, a Picture or a Clip. ValueError, which `where` begins, for what is
        not allowed or not there.
        """
        if not isinstance(given, str | os.PathLike):
            return given
        text = os.fspath(given)
        if text.startswith("data:"):
            return _data(text, where)
        if text.startswith(("http://", "https://")):
            return self._fetched(text, where)
        if not self.files:
            raise ValueError(f"{where}: a data: URL is expected, not {text[:60]!r}")
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"{where}: there is no file {path}")
        return path

    def _fetched(self, url: str, where: str) -> bytes:
        try:
            address = urlsplit(url)
            host, port = address.hostname or "", address.port
        except ValueError as error:
            raise ValueError(f"{where}: {url[:200]!r} is not a URL: {error}") from None
        if (f"{host}:{port}" if port else host) not in self.hosts:
            allowed = f"only {', '.join(self.hosts)}" if self.hosts else "send the file itself, as a data: URL"
            raise ValueError(f"{where}: nothing is fetched from {host!r}; {allowed}")
        if address.username is not None:
            raise ValueError(f"{where}: a URL with a user name is not fetched")
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
        deadline, parts, size = time.monotonic() + SECONDS, [], 0
        try:
            with opener.open(url, timeout=SECONDS / 2) as answer:
                while part := answer.read1(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_REMOTE_BYTES:
                        raise ValueError(f"{where}: {url[:200]} is larger than {MAX_REMOTE_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise ValueError(f"{where}: {url[:200]} took longer than {SECONDS:.0f} s")
        except OSError as error:
            raise ValueError(f"{where}: {url[:200]} cannot be fetched: {error}") from None
        return b"".join(parts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def payload(part: Mapping[str, Any], where: str) -> tuple[str, Any, str | None]:
    """("image" or "video", what holds it, the detail asked for) of a message's part.

    {"type": "image", "image": …} as in transformers, {"type": "image_url", "image_url": {"url": …, "detail": …}} as in
    OpenAI's API, and the same with "video". ValueError for a part without one of them.
    """
    name = part["type"]
    kind, field = MEDIA[name], f"{where}.{name}"
    held, detail = part.get(name), None
    if name.endswith("_url") and isinstance(held, Mapping):
        unknown = held.keys() - {"url", "detail"}
        if unknown:
            raise ValueError(f"{field}.{min(map(str, unknown))} is not supported")
        detail, held, field = held.get("detail"), held.get("url"), f"{field}.url"
        if detail not in (None, "auto", "low", "high"):
            raise ValueError(f"{where}.{name}.detail: 'auto', 'low' or 'high' is expected, not {detail!r}")
    if name.endswith("_url") and not isinstance(held, str):
        raise ValueError(f"{field}: a string is expected, not {'null' if held is None else type(held).__name__}")
    if held is None:
        raise ValueError(f'{where}: {{"type": "{name}", "{name}": …}} is expected')
    known = (str, bytes, os.PathLike, *((Patches, FilePicture) if kind == "image" else (Clip,)))
    if not isinstance(held, known) and not (kind == "image" and hasattr(held, "convert")):
        raise ValueError(f"{field}: a path, a URL or bytes are expected, not {type(held).__name__}")
    return kind, held, detail


def _data(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError(f"{where}: a data URL has a comma before its data")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the data URL is not base64: {error}") from None
