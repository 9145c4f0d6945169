"""Functions of tensors as CUDA graphs.

The networks of a controller are so small that a GPU runs their kernels faster than Python launches them. A
graph launches all of them at once. On any other device functions run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WARM_UPS = 2
"""Calls that run as they are before one is recorded: in the first, libraries and optimizers allocate."""

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """Runs functions, each as one CUDA graph from the third call with the same shapes on.

    What a recorded function reads and writes besides its arguments has to stay where it is: weights, moments,
    data. Where one of them is replaced, begin with new graphs. A function must do the same work whatever the
    values of its arguments: it must not read any back, nor draw random numbers.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    def run(self, name: Hashable, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function returns for some tensors, all on one device.

        Args:
            name: of the function; under one name and for the same shapes, all calls are to do the same work.
            function: takes the tensors.
            inputs: are not kept.
        """
        device = inputs[0].device
        if device.type != "cuda":
            return function(*inputs)
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        recording = self._recordings.get(key)
        if recording is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UPS:
                return _warm_up(function, inputs)
            recording = self._recordings[key] = _record(function, inputs)
        torch._foreach_copy_(recording.inputs, list(inputs))
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)


def _warm_up(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run it on the stream of the recording: some things are prepared for every stream by itself."""
    here, aside = torch.cuda.current_stream(inputs[0].device), _stream(inputs[0].device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        outputs = function(*inputs)
    here.wait_stream(aside)
    for tensor in outputs:
        tensor.record_stream(here)
    return outputs


def _record(function: Function, inputs: tuple[Tensor, ...]) -> _Recording:
    held = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process may use the GPU meanwhile.
    with torch.cuda.graph(graph, stream=_stream(inputs[0].device), capture_error_mode="thread_local"):
        outputs = function(*held)
    return _Recording(graph, held, outputs)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps tens of megabytes for every stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
