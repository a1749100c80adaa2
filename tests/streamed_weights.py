"""Blocks that are nothing but bytes, for tests of streams: each byte is its block's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from copy_queues import TwoQueues
from torch import Tensor, nn

from lowvram_i2v.streaming.block_stream import BlockStream, streamed_places
from lowvram_i2v.streaming.copy_queue import CopyQueue
from lowvram_i2v.streaming.host_blocks import Pinned
from lowvram_i2v.streaming.slab import SlabLayout, layout_of

CPU = torch.device("cpu")


class Weight(nn.Module):
    """A block that is nothing but bytes, all equal to its number."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.number = number
        self.weight: Tensor
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device="meta"))


@dataclass(frozen=True)
class Made:
    """Blocks, the layouts of those that are streamed, and their bytes."""

    blocks: list[Weight]
    layouts: dict[int, SlabLayout]
    slabs: dict[int, Tensor]

    def stream(self, slots: int, queue: CopyQueue[Any]) -> BlockStream[Any]:
        return BlockStream(self.blocks, self.layouts, Pinned(self.slabs), slots, CPU, queue)


def make(sizes: list[int], resident: int, slots: int) -> Made:
    made = Made([Weight(number, size) for number, size in enumerate(sizes)], {}, {})
    streamed = streamed_places(len(sizes), resident, slots)
    for number, block in enumerate(made.blocks):
        layout = layout_of(block, torch.float32)
        bytes_ = torch.full((layout.bytes,), number, dtype=torch.uint8)
        if number in streamed:
            made.layouts[number], made.slabs[number] = layout, bytes_
        else:
            layout.bind(block, bytes_)
    return made


def check(block: nn.Module) -> None:
    """Are these the block's bytes?"""
    assert isinstance(block, Weight)
    assert block.weight.eq(block.number).all(), f"block {block.number} sees {block.weight.unique().tolist()}"


def queue_use(queue: TwoQueues, block: nn.Module) -> None:
    """Two looks at the weights that are bound now, so that a copy may come between them."""
    assert isinstance(block, Weight)
    number, weight = block.number, block.weight

    def look() -> None:
        assert weight.eq(number).all(), f"block {number} sees {weight.unique().tolist()}"

    queue.compute(look)
    queue.compute(look)


def step_through(draw: random.Random, blocks: list[Weight], queue: TwoQueues, stream: BlockStream[int]) -> None:
    """A few steps, some of them abandoned, then both queues in a random order."""
    kept_alive = []  # a generator that nobody closes, as a trace keeps one
    for _ in range(draw.randint(1, 4)):
        last = draw.randint(0, len(blocks) - 1) if draw.random() < 0.3 else None
        step = iter(stream)
        for number, block in enumerate(step):
            assert block is blocks[number]
            if number != last or draw.random() < 0.5:
                queue_use(queue, block)
            if number == last:
                kept_alive.append(step)
                break
    stream.close()
    assert not any(queue.queues)
