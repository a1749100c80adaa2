"""From a file to a stream of blocks: resident ones are read to the device, streamed ones into the arena.

Invariants: every weight is read once, one tensor at a time, and cast when it is read, never in the loop; a block of
either kind is one allocation, or one slice of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lowvram_i2v.safetensors_file import SafetensorsFile
from lowvram_i2v.streaming.arena import arena
from lowvram_i2v.streaming.block_stream import BlockStream, Slab, streamed_places
from lowvram_i2v.streaming.copy_queue import CopyQueue, CudaCopyQueue, SynchronousCopy
from lowvram_i2v.streaming.slab import SlabLayout, byte_range, layout_of


@contextmanager
def stream_blocks(
    file: SafetensorsFile,
    blocks: Mapping[str, nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype,
    resident: int,
    slots: int,
    only: Callable[[str], bool] = lambda name: True,
    queue: CopyQueue[Any] | None = None,
) -> Iterator[BlockStream[Any]]:
    """A stream of blocks whose weights come from the file, while a `with` lasts.

    blocks: name in the file -> module on the meta device, in the order of a step, linear layers quantized as stored.
    dtype: what the file's floats become. resident: how many blocks stay on the device, -1 for all. only: which weights,
    by full name; the others stay as they are. queue: the device's own if not given. At the end the blocks are empty.
    Raises CheckpointError if a streamed block is not one piece of the file, ResourceError for too little RAM.
    """
    modules, layouts = list(blocks.values()), _layouts(blocks, dtype, only)
    reads = [partial(_read, file, name) for name in blocks]
    streamed = streamed_places(len(blocks), resident, slots)
    for place in streamed:
        byte_range(file, f"{list(blocks)[place]}.", only)
    sizes = [layouts[place].bytes for place in streamed]
    if queue is None:
        queue = CudaCopyQueue(device) if device.type == "cuda" else SynchronousCopy()

    with arena(sum(sizes), device) as memory:
        slabs = {}
        for place, end in zip(streamed, accumulate(sizes), strict=True):
            slabs[place] = Slab(layouts[place], memory[end - layouts[place].bytes : end])
            layouts[place].fill(slabs[place].bytes, reads[place])
        for place, layout in enumerate(layouts):
            if place not in slabs:
                slab = torch.empty(layout.bytes, dtype=torch.uint8, device=device)
                layout.fill(slab, reads[place])
                layout.bind(modules[place], slab)
        for module in modules:
            module.eval().requires_grad_(False)
        stream = BlockStream(modules, slabs, slots, device, queue)
        try:
            yield stream
        finally:
            stream.close()
            for module in modules:
                module.to("meta")


def _layouts(blocks: Mapping[str, nn.Module], dtype: torch.dtype, only: Callable[[str], bool]) -> list[SlabLayout]:
    def wanted(block: str, name: str) -> bool:
        return only(f"{block}.{name}")

    return [layout_of(block, dtype, partial(wanted, name)) for name, block in blocks.items()]


def _read(file: SafetensorsFile, block: str, name: str) -> torch.Tensor:
    return file.read(f"{block}.{name}")
