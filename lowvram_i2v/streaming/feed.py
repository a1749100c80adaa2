"""Feeding a model that is not ours: its layers take their weights from a stream of blocks as they are called.

Invariant: hooks are the only change to the model, and they are gone when the `with` ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lowvram_i2v.streaming.block_stream import BlockStream


@contextmanager
def feed(layers: Sequence[nn.Module], stream: BlockStream[Any]) -> Iterator[None]:
    """While a `with` lasts, calling the layers one after the other, as a forward of their model does, walks through the
    stream: each has its weights from when it is called until the next one is. Any number of forwards, one at a time;
    one that an error ended may be followed by others.

    layers: the stream's blocks, in its order. Raises RuntimeError if they are called in another order.
    """
    walk: Iterator[nn.Module] = iter(())

    def bring(layer: nn.Module, *_: Any) -> None:
        nonlocal walk
        if layer is layers[0]:
            walk = iter(stream)
        if next(walk, None) is not layer:
            raise RuntimeError("the layers of a streamed model were called in another order than the stream's")

    def end(*_: Any) -> None:
        if next(walk, None) is not None:
            raise RuntimeError("the stream has more blocks than the model has layers")

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(bring).remove)
        hooks.callback(layers[-1].register_forward_hook(end).remove)
        yield
