"""From a file to a stream of blocks: resident ones are read to the device; streamed ones into the arena, or again and
again into the ring.

Invariants: a weight is cast when it is read, never on the device in the loop; what is read once is read one tensor at a
time; a block of either kind is one allocation, or one slice of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import SafetensorsFile
from lowvram_i2v.streaming.arena import PAGE, arena
from lowvram_i2v.streaming.block_stream import BlockStream, streamed_places
from lowvram_i2v.streaming.copy_queue import CopyQueue, CudaCopyQueue, SynchronousCopy
from lowvram_i2v.streaming.host_blocks import HostBlocks, Pinned
from lowvram_i2v.streaming.reading import DiskFile, ReadPlan, buffer_bytes
from lowvram_i2v.streaming.ring import BUFFERS, Fill, Ring, Stop
from lowvram_i2v.streaming.slab import SlabLayout, below, layout_of

READERS = 1
"""Threads that read blocks from the disk."""


@contextmanager
def stream_blocks(
    file: SafetensorsFile,
    blocks: Mapping[str, nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype,
    resident: int,
    slots: int,
    host: str = "pinned",
    only: Callable[[str], bool] = lambda name: True,
    queue: CopyQueue[Any] | None = None,
) -> Iterator[BlockStream[Any]]:
    """A stream of blocks whose weights come from the file, while a `with` lasts.

    blocks: name in the file -> module on the meta device, in the order of a step, linear layers quantized as stored.
    dtype: what the file's floats become. resident: how many blocks stay on the device, -1 for all. host: where the
    others are, a name in HOSTS. only: which weights, by full name; the others stay as they are. queue: the device's own
    if not given. At the end the blocks are empty.
    Raises CheckpointError if the file has no such tensors or cannot be read, ResourceError for too little RAM.
    """
    modules = list(blocks.values())
    layouts = [_layout(file, name, block, dtype, only) for name, block in blocks.items()]
    plans = [ReadPlan.of(file, name, layout) for name, layout in zip(blocks, layouts, strict=True)]
    streamed = {place: plans[place] for place in streamed_places(len(blocks), resident, slots)}
    if queue is None:
        queue = CudaCopyQueue(device) if device.type == "cuda" else SynchronousCopy()

    with HOSTS[host](file, streamed, device, queue) as in_host:
        for place in set(range(len(blocks))) - streamed.keys():
            slab = torch.empty(layouts[place].bytes, dtype=torch.uint8, device=device)
            layouts[place].fill(slab, partial(_read, file, plans[place].block))
            layouts[place].bind(modules[place], slab)
        for module in modules:
            module.eval().requires_grad_(False)
        layout_of_streamed = {place: plan.layout for place, plan in streamed.items()}
        try:
            with closing(BlockStream(modules, layout_of_streamed, in_host, slots, device, queue)) as stream:
                yield stream
        finally:
            queue.finish()  # copies of a stream that could not begin, too
            for module in modules:
                module.to("meta")


def slab_bytes(
    blocks: Mapping[str, nn.Module], dtype: torch.dtype, only: Callable[[str], bool] = lambda name: True
) -> list[int]:
    """The length of each block's slab, for `stream_blocks` with the same arguments. Blocks on the meta device do."""
    return [layout_of(block, dtype, below(name, only)).bytes for name, block in blocks.items()]


def host_bytes(slabs: Sequence[int], streamed: Sequence[int], host: str) -> int:
    """RAM that `stream_blocks` allocates, all of it page-locked for a CUDA device.

    slabs: the length of each block's (`slab_bytes`). streamed: `streamed_places`. host: a name in HOSTS.
    """
    lengths = [slabs[place] for place in streamed]
    if not lengths:
        return 0
    return PAGE + (sum(lengths) if host == "pinned" else BUFFERS * buffer_bytes(max(lengths)))


@contextmanager
def _pinned(
    file: SafetensorsFile, plans: Mapping[int, ReadPlan], device: torch.device, queue: CopyQueue[Any]
) -> Iterator[HostBlocks[Any]]:
    """All streamed blocks in page-locked memory."""
    sizes = [plan.layout.bytes for plan in plans.values()]
    with arena(sum(sizes), device) as memory:
        slabs = {}
        for (place, plan), end in zip(plans.items(), accumulate(sizes), strict=True):
            slabs[place] = memory[end - plan.layout.bytes : end]
            plan.layout.fill(slabs[place], partial(_read, file, plan.block))
        yield Pinned(slabs)


@contextmanager
def _mapped(
    file: SafetensorsFile, plans: Mapping[int, ReadPlan], device: torch.device, queue: CopyQueue[Any]
) -> Iterator[HostBlocks[Any]]:
    """A few blocks in page-locked memory at a time, read by threads."""
    if not plans:
        yield Pinned({})
        return
    size = buffer_bytes(max(plan.layout.bytes for plan in plans.values()))
    with ExitStack() as stack:
        memory = stack.enter_context(arena(BUFFERS * size, device))
        disks = [stack.enter_context(closing(DiskFile(file.path))) for _ in range(READERS)]
        fills = [_fill_from(file, plans, disk) for disk in disks]
        yield stack.enter_context(
            closing(
                Ring(
                    sorted(plans),
                    [memory[start : start + size] for start in range(0, len(memory), size)],
                    fills,
                    queue.await_copied,
                )
            )
        )


Host = Callable[
    [SafetensorsFile, Mapping[int, ReadPlan], torch.device, CopyQueue[Any]], AbstractContextManager[HostBlocks[Any]]
]
HOSTS: dict[str, Host] = {"pinned": _pinned, "mapped": _mapped}
"""Where streamed blocks are: all in RAM, or in the file, from which every step reads them through a ring of a few."""


def _fill_from(file: SafetensorsFile, plans: Mapping[int, ReadPlan], disk: DiskFile) -> Fill:
    def fill(place: int, buffer: Tensor, stop: Stop) -> Tensor:
        return plans[place].read(file, disk, buffer, stop)

    return fill


def _layout(
    file: SafetensorsFile, block: str, module: nn.Module, dtype: torch.dtype, only: Callable[[str], bool]
) -> SlabLayout:
    """The block's tensors in the file's order. Raises CheckpointError for those that the file does not have."""

    def start(name: str) -> int:
        if f"{block}.{name}" not in file.entries:
            raise CheckpointError(f"{file.path} has no tensor {block}.{name}", "Convert the weights again.")
        return file.entries[f"{block}.{name}"].start

    return layout_of(module, dtype, below(block, only), start)


def _read(file: SafetensorsFile, block: str, name: str) -> Tensor:
    return file.read(f"{block}.{name}")
