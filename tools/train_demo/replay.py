"""A training step's losses and gradients as a CUDA graph: recorded once for each shape, then replayed with one launch.

A step of the demo model is some two thousand small kernels; launching them from Python takes longer than running them,
and other threads make it longer still. Forward and backward pass are recorded together. Not in the graph: optimizer and
moving average, and random numbers, which come in as inputs so that a step is the same with and without a graph.

Invariants: inputs are copied into the recording's own; gradients lie in the recording's own memory until its next
replay, and are the loss's own: whoever differentiates a multiple of it gets the same. On a CPU nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.train_demo.loop import Losses

WARM = 3  # steps before the recording: libraries choose algorithms, compilers compile


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    losses: Losses
    gradients: list[Tensor | None]


class Replayed:
    """losses: tensors of fixed shapes -> losses, with a graph. weights: what they are differentiated by."""

    def __init__(self, losses: Callable[..., Losses], weights: Sequence[Tensor]) -> None:
        self._losses, self._weights = losses, list(weights)
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Losses:
        """The losses, valid until the next call. `backward` of "loss" puts gradients in the weights' `grad`."""
        if not inputs[0].is_cuda:
            return self._losses(*inputs)
        recording = self._recorded(inputs)
        torch._foreach_copy_(recording.inputs, list(inputs))
        recording.graph.replay()
        anchor = torch.empty((), device=inputs[0].device, requires_grad=True)
        loss: Tensor = _HandOver.apply(anchor, recording, self._weights)  # type: ignore[no-untyped-call]
        return recording.losses | {"loss": loss}

    def prepare(self, *inputs: Tensor) -> None:
        """Records for inputs like these, whatever they hold."""
        if inputs[0].is_cuda:
            self._recorded(inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> _Recording:
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record([one.detach().clone() for one in inputs])
        return self._recordings[shapes]

    def _record(self, inputs: list[Tensor]) -> _Recording:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._forget_gradients()
                torch.autograd.backward(self._losses(*inputs)["loss"])
        torch.cuda.current_stream().wait_stream(side)
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            losses = self._losses(*inputs)
            torch.autograd.backward(losses["loss"])
        gradients = [weight.grad for weight in self._weights]
        self._forget_gradients()
        return _Recording(graph, inputs, {key: value.detach() for key, value in losses.items()}, gradients)

    def _forget_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None


class _HandOver(torch.autograd.Function):
    """A replay's loss, whose backward pass is done already."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recording: _Recording, weights: list[Tensor]) -> Tensor:
        ctx.recording, ctx.weights = recording, weights
        return recording.losses["loss"].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for weight, gradient in zip(ctx.weights, ctx.recording.gradients, strict=True):
            weight.grad = gradient
        return torch.zeros_like(grad), None, None
