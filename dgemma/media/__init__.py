"""Images and video to what the network reads. Needs no torch; pillow and av are imported where they are used."""

from importlib import import_module
from typing import Any


def needed(module: str) -> Any:
    """A module of the extra `media`; ValueError says how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        told = f"images and video need the extra: pip install 'dgemma[media]' ({package} is not installed)"
        raise ValueError(told) from None
