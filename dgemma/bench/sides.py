"""The two sides of `dgemma bench decode`, each for a process of its own: a model directory in, seconds out.

Steps count denoising steps of one canvas; early stopping is off, so that both sides take as many as they are told.
Neither constructor imports the other side's library.
"""

from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any

from dgemma.bench.harness import peak_bytes

NEVER = 1e-30
"""transformers' threshold must be above 0; no canvas gets there."""


class Common:
    """What the sides of every comparison have: their threads, a device, and how much memory they took."""

    def __init__(self, device: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.device = device

    def peak(self) -> int | None:
        """Bytes of this process, or on a GPU those of its tensors."""
        import torch

        return peak_bytes() if self.device == "cpu" else torch.accelerator.max_memory_allocated(self.device)

    def _wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)


class _Timed(Common, ABC):
    """What both sides measure, from what each can do."""

    vocab_size: int

    def __init__(self, device: str, threads: int, tokens: int):
        super().__init__(device, threads)
        self.tokens = tokens

    def prefill(self) -> float:
        """Seconds to encode the prompt."""
        started = perf_counter()
        self._encode()
        self._wait()
        return perf_counter() - started

    def decode(self, steps: int) -> float:
        """Seconds to encode the prompt and denoise one canvas."""
        started = perf_counter()
        self._generate(steps)
        self._wait()
        return perf_counter() - started

    def _prompt(self) -> Any:
        """int64 [tokens], the same on both sides."""
        from dgemma.decoding.noise import Noise

        return Noise(1, self.vocab_size, self.tokens).canvas(0).to(self.device)

    @abstractmethod
    def _encode(self) -> None:
        """Encodes the prompt into a cache of its own."""

    @abstractmethod
    def _generate(self, steps: int) -> None:
        """Encodes the prompt and denoises one canvas."""


class Ours(_Timed):
    """This project."""

    def __init__(self, directory: str, device: str, threads: int, tokens: int, quantize: str | None = None):
        super().__init__(device, threads, tokens)
        from dgemma.checkpoints.load import load_model
        from dgemma.memory import keep_freed_memory

        self.model = load_model(directory, device, quantize=quantize)
        if device == "cpu":  # as `dgemma.load` does
            keep_freed_memory()
        self.vocab_size = self.model.config.vocab_size

    def trajectory(self, steps: int) -> list[list[list[int]]]:
        """The canvas and the best tokens after each step."""
        from dgemma.decoding.events import Step

        return [[e.canvas.tolist(), e.best.tolist()] for e in self._events(steps) if isinstance(e, Step)]

    def _encode(self) -> None:
        import torch

        with torch.inference_mode():
            self.model.encode(self._prompt()[None], self.model.new_cache())

    def _generate(self, steps: int) -> None:
        for _ in self._events(steps):
            pass

    def _events(self, steps: int) -> Any:
        from dgemma.config import GenerationConfig
        from dgemma.decoding import blocks
        from dgemma.decoding.noise import Noise

        length = self.model.config.canvas_length
        options = GenerationConfig(max_new_tokens=length, max_denoising_steps=steps, confidence_threshold=0)
        noise = Noise(0, self.vocab_size, length)
        return blocks.generate(self.model, [blocks.Request(self._prompt(), options, noise)])


class Transformers(_Timed):
    """transformers as it comes."""

    def __init__(self, directory: str, device: str, threads: int, tokens: int):
        super().__init__(device, threads, tokens)
        from transformers import DiffusionGemmaForBlockDiffusion

        model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(directory)
        self.model = model.eval().to(device)
        self.vocab_size = self.model.config.text_config.vocab_size

    def trajectory(self, steps: int) -> list[list[list[int]]]:
        """The same, with the draws of this project's noise in place of its own."""
        from dgemma.config import GenerationConfig
        from dgemma.conformance.reference import generate
        from dgemma.decoding.noise import Noise

        length = self.model.config.canvas_length
        options = GenerationConfig(max_new_tokens=length, max_denoising_steps=steps, confidence_threshold=NEVER)
        ((block,),), _ = generate(self.model, self._prompt()[None], options, [Noise(0, self.vocab_size, length)])
        return [[canvas, best] for canvas, best in zip(block.canvas.tolist(), block.best.tolist(), strict=True)]

    def _encode(self) -> None:
        import torch
        from transformers import DynamicCache

        with torch.no_grad():
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            self.model.model.encoder(input_ids=self._prompt()[None], past_key_values=cache)

    def _generate(self, steps: int) -> None:
        self.model.generate(
            self._prompt()[None],
            max_new_tokens=self.model.config.canvas_length,
            max_denoising_steps=steps,
            confidence_threshold=NEVER,
        )
