"""The arena: one piece of page-locked host memory, for every streamed block or for the ring of a few.

Invariants: one allocation, exactly as long as asked. torch's own pinned memory is rounded up to a power of two (9.1 GB
would take 16 GiB), so ordinary memory is allocated and then page-locked in place. On machines without CUDA it stays
ordinary memory. Linux is asked for pages of 2 MiB: millions of small ones take seconds to make, lock and free. It
is asked to make them by itself, on some threads: while the driver makes and locks them, launches may wait for it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.host_memory import available_ram

PAGE = 4096
LARGE_PAGE = 2 << 20
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14 and later
MAKERS = 4  # threads that make pages


@dataclass(frozen=True)
class Tenant:
    """Who wants memory, and what the user may do where there is none."""

    name: str
    remedy: str

    def check_ram(self, size: int) -> None:
        """Raises ResourceError with need and have if the machine has less free RAM."""
        free = available_ram()
        if free is not None and size > free:
            need = f"{self.name} need {size / 2**30:.2f} GiB of RAM"
            raise ResourceError(f"{need}, and {free / 2**30:.2f} GiB are available", self.remedy)


BLOCKS = Tenant(
    "streamed blocks",
    "Close other programs, use weights in a smaller scheme (int8, nf4), or keep more blocks resident in video memory "
    "(resident_blocks in the profile).",
)


@contextmanager
def arena(size: int, device: torch.device, tenant: Tenant = BLOCKS) -> Iterator[Tensor]:
    """`size` bytes of host memory, uint8, from a page's start, while a `with` lasts; page-locked where the device is a
    CUDA one. Whoever copies from it must have ended before the end of the `with`.

    Raises ResourceError with need and have if the machine has too little free RAM or refuses to lock it.
    """
    if not size:
        yield torch.empty(0, dtype=torch.uint8)
        return
    tenant.check_ram(size)
    memory = page_aligned(size, tenant)
    _ask_for_large_pages(memory)
    if device.type != "cuda":
        yield memory
        return
    _make_pages(memory)
    with _page_locked(memory, device, tenant):
        yield memory


def page_aligned(size: int, tenant: Tenant = BLOCKS) -> Tensor:
    """`size` bytes of ordinary memory, uint8, that start at a page. Raises ResourceError where they are refused."""
    try:
        memory = torch.empty(size + PAGE, dtype=torch.uint8)
    except RuntimeError as error:
        refused = f"{size / 2**30:.2f} GiB of RAM for {tenant.name} were refused"
        raise ResourceError(refused, tenant.remedy) from error
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]


def _ask_for_large_pages(memory: Tensor) -> None:
    """A request: where it is refused, pages are small."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), advice)


def _make_pages(memory: Tensor) -> None:
    """A request too: where it is refused, pages are made when they are first used."""
    if sys.platform != "linux":
        return
    piece = max(1, memory.numel() // MAKERS // LARGE_PAGE) * LARGE_PAGE
    madvise, end = ctypes.CDLL(None).madvise, memory.numel() // PAGE * PAGE

    def make(start: int) -> None:
        madvise(ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(min(piece, end - start)), POPULATE_WRITE)

    with ThreadPoolExecutor(MAKERS) as threads:
        list(threads.map(make, range(0, end, piece)))


@contextmanager
def _page_locked(memory: Tensor, device: torch.device, tenant: Tenant) -> Iterator[None]:
    """Page-locks memory for all CUDA devices while a `with` lasts."""
    with torch.cuda.device(device):
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 1))  # 1: for all contexts
        if code:
            raise ResourceError(
                f"the driver would not page-lock {memory.numel() / 2**30:.2f} GiB of RAM for {tenant.name} "
                f"(CUDA error {code})",
                f"Raise the limit of locked memory (ulimit -l), if there is one. {tenant.remedy}",
            )
        try:
            yield
        finally:
            cudart.cudaHostUnregister(memory.data_ptr())
