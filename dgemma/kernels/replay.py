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
            self.inputs = tuple(x.clone() for x in inputs)
            self.graph, self.outputs = _recorded(function, self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


def _recorded(function: Function, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """As `torch.cuda.graph` does it, which also collects garbage and gives all free memory back, each time."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = function(*inputs)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, outputs
