"""The model behind the server, from loading to closing."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Literal

from dgemma import config
from dgemma.engine.engine import Engine
from dgemma.engine.scheduler import Limits
from dgemma.language_model import LanguageModel
from dgemma.media.sources import Sources
from dgemma.quant.modules import matrices
from dgemma.serve.accounting import InWork
from dgemma.serve.errors import ApiError, closing
from dgemma.serve.metrics import Metrics
from dgemma.serve.recorder import Recorder


class Service:
    """One model under one name. `status` is "loading" until `open`, and "closing" once no new request is taken.

    trace: a file that is to record every request; one that cannot be opened is an OSError. media_hosts: servers that
    images and videos are fetched from; others must come with the request.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        time_limit: float,
        trace: Path | None = None,
        media_hosts: Sequence[str] = (),
    ):
        self._trace = trace.open("wb") if trace else None
        self.recorder: Recorder | None = None
        self.name, self.limits, self.time_limit = name, limits, time_limit
        self.names = {name, PurePath(name).name, "default"}
        self.status: Literal["loading", "ok", "closing"] = "loading"
        self.metrics, self.in_work = Metrics(), InWork()
        self.aside = asyncio.Semaphore(1)
        """For what holds pages beside the engine's: the autoregressive mode, log-probabilities. One at a time."""
        self.compiling = asyncio.Semaphore(2)
        """Constraints that are compiled at once: whoever waits for text needs the processor too."""
        self.opening = asyncio.Semaphore(2)
        """Requests whose images and videos are decoded at once: each may take much memory while it is."""
        self.sources = Sources(files=False, hosts=tuple(media_hosts))
        self.fingerprint = ""
        self._opened: tuple[LanguageModel, Engine] | None = None

    def open(self, lm: LanguageModel) -> None:
        """Begins to serve a model; any thread may call it."""
        engine = Engine(lm.model, self.limits)
        self.metrics.watch(engine.scheduler)
        model, formats = lm.model, sorted({matrix.kind for matrix in matrices(lm.model).values()})
        described = f"{version('dgemma')} {self.name} {model.dtype} {model.device} {formats} {model.page_format}"
        self.fingerprint = f"fp_{blake2b(described.encode(), digest_size=6).hexdigest()}"
        if self._trace:
            self.recorder = Recorder(self._trace, self.name, lm)
        self._opened = lm, engine
        if self.status == "loading":
            self.status = "ok"

    def close(self) -> None:
        """Cancels what is in work."""
        self.status = "closing"
        if self._opened:
            self.engine.close(drain=False)
        if self._trace:
            self._trace.close()

    @property
    def lm(self) -> LanguageModel:
        return self._model()[0]

    @property
    def engine(self) -> Engine:
        return self._model()[1]

    def check(self, name: str) -> None:
        """ApiError unless a request for this model can be taken now."""
        if self.status == "closing":
            raise closing()
        self._model()
        if name not in self.names:
            raise ApiError(404, f"the model {name!r} is not served here; {self.name!r} is", "model", "model_not_found")

    @property
    def thinks(self) -> bool:
        return self._template_knows("enable_thinking")

    @property
    def takes_tools(self) -> bool:
        return self._template_knows("tools")

    def describe(self) -> dict[str, Any]:
        """What the model can do and does by default."""
        sizes: config.ModelConfig = self.lm.model.config
        return {
            "canvas_length": sizes.canvas_length,
            "max_position_embeddings": sizes.max_position_embeddings,
            "defaults": asdict(self.lm.defaults),
            "thinking": self.thinks,
            "tools": self.takes_tools,
            "images": sizes.vision is not None,
            # A model made for one task takes one question at a time.
            "conversation": self.lm.task is None,
        }

    def _template_knows(self, variable: str) -> bool:
        return self.lm.template is not None and variable in self.lm.template.source

    def _model(self) -> tuple[LanguageModel, Engine]:
        if self._opened is None:
            raise ApiError(503, "the model is being loaded; try again later", code="loading")
        return self._opened
