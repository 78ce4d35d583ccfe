"""dgemma: run, serve, edit with, constrain, fine-tune and study DiffusionGemma.

Importing it does not import torch; the names below do, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dgemma.config import GenerationConfig, ModelConfig

if TYPE_CHECKING:
    from dgemma.constraints.grammar import grammar
    from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
    from dgemma.language_model import Chat, Generation, LanguageModel, load

_LATER = {
    **dict.fromkeys(("Block", "Event", "Finished", "Prefilled", "Step"), "dgemma.decoding.events"),
    "grammar": "dgemma.constraints.grammar",
    **dict.fromkeys(("Chat", "Generation", "LanguageModel", "load"), "dgemma.language_model"),
}

__all__ = [
    "Block",
    "Chat",
    "Event",
    "Finished",
    "Generation",
    "GenerationConfig",
    "LanguageModel",
    "ModelConfig",
    "Prefilled",
    "Step",
    "grammar",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'dgemma' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
