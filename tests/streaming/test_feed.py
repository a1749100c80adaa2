"""A foreign model's layers fed by a stream, through hooks that leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from copy_queues import DelayedCopy
from streamed_weights import CPU
from torch import Tensor, nn

from lowvram_i2v.streaming.block_stream import BlockStream
from lowvram_i2v.streaming.feed import feed
from lowvram_i2v.streaming.host_blocks import Pinned
from lowvram_i2v.streaming.slab import layout_of

LAYERS = 6


def model(fail: bool = False) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))


def streamed(whole: nn.Sequential, resident: tuple[int, ...] = ()) -> tuple[nn.Sequential, BlockStream[int]]:
    """The same model with empty weights, and the stream that has them."""
    with torch.device("meta"):
        empty = model()
    layouts = {place: layout_of(layer, torch.float32) for place, layer in enumerate(empty)}
    slabs = {}
    for place, layer in enumerate(whole):
        slabs[place] = torch.empty(layouts[place].bytes, dtype=torch.uint8)
        layouts[place].fill(slabs[place], layer.state_dict().__getitem__)
        if place in resident:
            layouts.pop(place).bind(empty[place], slabs.pop(place))
    return empty, BlockStream(list(empty), layouts, Pinned(slabs), 2, CPU, DelayedCopy())


@pytest.mark.parametrize("resident", [(), (0, 5), (1, 2)])
@torch.inference_mode()
def test_several_forwards_equal_the_loaded_model(resident: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    whole, x = model(), torch.randn(3, 8)
    empty, stream = streamed(whole, resident)
    with feed(list(empty), stream):
        for scale in (1, 2, 3):
            assert torch.equal(empty(scale * x), whole(scale * x))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in empty)


@pytest.mark.parametrize("place", range(LAYERS))
@torch.inference_mode()
def test_a_forward_that_failed_may_be_followed_by_others(place: int) -> None:
    torch.manual_seed(0)
    whole, x = model(), torch.randn(3, 8)
    empty, stream = streamed(whole)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("as a card does")

    with feed(list(empty), stream):
        hook = empty[place].register_forward_hook(fail, prepend=True)
        with pytest.raises(torch.OutOfMemoryError):
            empty(x)
        hook.remove()
        for _ in range(2):
            assert torch.equal(empty(x), whole(x))


@torch.inference_mode()
def test_another_order_is_a_bug() -> None:
    empty, stream = streamed(model())
    x = torch.randn(1, 8)
    with feed(list(empty), stream), pytest.raises(RuntimeError, match="another order"):
        empty[2](empty[0](x))
    with feed(list(empty)[:4], stream), pytest.raises(RuntimeError, match="more blocks"):
        empty[:4](x)
