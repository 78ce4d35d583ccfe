"""A step as one CUDA graph: a small batch's step is some thousand kernels, which take longer to launch than to run."""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Replay:
    """A function of tensors that is called the first time, recorded the second, and from then on replayed.

    It must be the same function each time, of inputs of the same shapes, and must not wait for the device.
    """

    def __init__(self) -> None:
        self.called = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.called:  # sets up whatever is made on first use
            self.called = True
            return function(*inputs)
        if self.graph is None:
            self.inputs, graph = tuple(x.clone() for x in inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
            self.graph = graph
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
