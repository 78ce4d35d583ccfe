"""Messages with images and video to a prompt: payloads opened, and markers in the text spelled out in soft tokens."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgemma.config import BUDGETS, MediaConfig, ModelConfig, VisionConfig
from dgemma.media.images import FilePicture, open_image, picture_of
from dgemma.media.sources import OPENED, Sources, payload
from dgemma.media.video import frames
from dgemma.picture import Clip, Picture, Placed, Prompted
from dgemma.text.messages import MEDIA, map_text
from dgemma.text.tokenizer import BREAK, Tokenizer

VIDEO = "<|video|>"
"""What templates write for a video; no model of the family has tokens of its own for one."""
DETAIL = {"low": BUDGETS[0], "high": BUDGETS[-1]}
Media = Picture | Clip


def shows(messages: Any) -> bool:
    """Whether there is an image or a video in messages that are well formed."""
    return any(True for _ in _parts(messages))


def opened(
    messages: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    media: MediaConfig,
    sources: Sources,
    held: bool = True,
) -> list[dict[str, Any]]:
    """The messages with Pictures and Clips in the places of their images and videos.

    ValueError that names the message and the part; also for a model that takes no images, or has no positions for so
    many: that is told before the next one is opened. held: keep the patches of image files; otherwise they are read
    again when they are needed.
    """
    changed, soft = [dict(message) for message in messages], 0
    for i, j, part in _parts(messages):
        where = f"messages[{i}].content[{j}]"
        kind, given, detail = payload(part, where)
        vision = _vision(config, where)
        if not isinstance(given, OPENED):
            wanted = replace(media, image_tokens=DETAIL[detail]) if detail in DETAIL else media
            given = _opened(kind, sources.bytes_of(given, where), where, wanted, vision, held)
        soft += sum(_length(picture, vision) for picture in _pictures(given))
        if soft > config.max_position_embeddings:
            have = config.max_position_embeddings
            raise ValueError(
                f"{where}: up to here images and videos take {soft} tokens; the model has {have} positions"
            )
        content = changed[i]["content"]
        if content is messages[i]["content"]:
            content = changed[i]["content"] = list(content)
        content[j] = {"type": kind, kind: given}
    return changed


def _opened(kind: str, source: Any, where: str, media: MediaConfig, vision: VisionConfig, held: bool) -> Media:
    name = f"{where}: {os.fspath(source)}" if isinstance(source, os.PathLike) else f"{where}: the {kind}"
    if kind == "image" and isinstance(source, Path) and not held:
        return FilePicture.of(source, name, media.image_tokens, vision)
    if kind == "image":
        return picture_of(open_image(source, name), media.image_tokens, vision)
    shown = frames(source, name, media.video_frames)
    return Clip(tuple((second, picture_of(image, media.frame_tokens, vision)) for second, image in shown))


def rooted(messages: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with paths of images and videos that begin in a folder instead of the working directory."""
    changed = [dict(message) for message in messages]
    for i, j, part in _parts(messages):
        held = part.get(part["type"])
        if isinstance(held, str) and not held.startswith(("data:", "http://", "https://")):
            content = changed[i]["content"] = list(changed[i]["content"])
            content[j] = {**part, part["type"]: str(folder / held)}
    return changed


def quiet(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, config: ModelConfig) -> list[Any]:
    """The messages for a template, with the marks of images and videos broken in all texts: a model may write them."""
    markers = [tokenizer.token(config.image_token_id), VIDEO] if config.image_token_id is not None else [VIDEO]

    def change(text: str) -> str:
        for marker in markers:
            text = text.replace(marker, _broken(marker))
        return text

    return [map_text(message, change) for message in messages]


def prompted(text: str, shown: Sequence[Media], tokenizer: Tokenizer, config: ModelConfig) -> Prompted:
    """A prompt in tokens, rendered from `quiet` messages, with each marker spelled out: an image as its soft tokens
    between two that open and close it, a video as the time and the image of each frame.
    """
    if not shown:
        return Prompted(tokenizer.encode(_whole(text, tokenizer)))
    vision = _vision(config, "the prompt")
    if None in (config.image_token_id, config.boi_token_id, config.eoi_token_id):
        raise ValueError("config.json names no image_token_id, boi_token_id and eoi_token_id: it takes no images")
    image, begin, end = (
        tokenizer.token(i or 0) for i in (config.image_token_id, config.boi_token_id, config.eoi_token_id)
    )
    found = list(re.finditer(f"{re.escape(image)}|{re.escape(VIDEO)}", text))
    wanted = [VIDEO if isinstance(each, Clip) else image for each in shown]
    if [match[0] for match in found] != wanted:
        raise ValueError(
            f"the chat template made {len(found)} places ({image}, {VIDEO}) for {len(wanted)} images and videos"
        )
    block = lambda picture: f"{begin}{image * _length(picture, vision)}{end}"  # noqa: E731
    spelled, at = [], 0
    for match, each in zip(found, shown, strict=True):
        blocks = [f"{_clock(t)} {block(p)}" for t, p in each.frames] if isinstance(each, Clip) else [block(each)]
        spelled += [text[at : match.start()], " ".join(blocks)]
        at = match.end()
    tokens = tokenizer.encode(_whole("".join([*spelled, text[at:]]), tokenizer))
    pictures = [picture for each in shown for picture in _pictures(each)]
    return Prompted(tokens, _placed(tokens, pictures, vision, config.image_token_id))


def media_of(messages: Sequence[Mapping[str, Any]]) -> list[Media]:
    """The Pictures and Clips of opened messages, in the order of their parts."""
    return [part[part["type"]] for _, _, part in _parts(messages)]


def _parts(messages: Any) -> Any:
    """(message's number, part's number, part) of each image and video, where `prepare_messages` finds one."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            for j, part in enumerate(content):
                if isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in MEDIA:
                    yield i, j, part


def _placed(tokens: list[int], pictures: list[Picture], vision: VisionConfig, image: int | None) -> tuple[Placed, ...]:
    placed, at = [], 0
    for picture in pictures:
        length = _length(picture, vision)
        at = tokens.index(image or 0, at)
        placed.append(Placed(picture, at, at + length))
        at += length
    return tuple(placed)


def _pictures(media: Media) -> list[Picture]:
    return [picture for _, picture in media.frames] if isinstance(media, Clip) else [media]


def _broken(marker: str) -> str:
    return marker[0] + BREAK + marker[1:]


def _whole(text: str, tokenizer: Tokenizer) -> str:
    """Takes the mark out of what is no token of the tokenizer's, which takes it out of its own."""
    return text if VIDEO in tokenizer.added else text.replace(_broken(VIDEO), VIDEO)


def _length(picture: Picture, vision: VisionConfig) -> int:
    return picture.rows * picture.columns // vision.pooling_kernel_size**2


def _clock(second: float) -> str:
    return f"{int(second // 60):02d}:{int(second % 60):02d}"


def _vision(config: ModelConfig, where: str) -> VisionConfig:
    if config.vision is None:
        raise ValueError(f"{where}: this model has no vision tower: it takes no images or video")
    return config.vision
