"""The only file that asks torch about the machine: which device, which dtype, how much memory.

Invariant: nothing here runs at import; `torch` itself is imported inside the functions that need it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowvram_i2v.errors import PlatformError, ResourceError
from lowvram_i2v.events import Listener, PhaseFinished, PhaseStarted

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU; "cpu", "cuda" and "cuda:N" are taken by their word. A CUDA device
    becomes the current one: kernels and events go where that is.

    Raises PlatformError if a named CUDA device is not there.
    """
    if sys.platform == "linux":  # before the first allocation: freed pages of any size can then be used again
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PlatformError(f"{name!r} is not a device", "Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise PlatformError(f"device {name!r} is not supported", "Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            f"device {name!r} was asked for, but this torch ({torch.__version__}) sees no CUDA device",
            "Install a CUDA build of torch and a driver, or use --device cpu.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlatformError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices",
            f"Use cuda:0 to cuda:{torch.cuda.device_count() - 1}.",
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def compute_dtype(device: torch.device, on_cuda: torch.dtype) -> torch.dtype:
    """`on_cuda` on a CUDA device; float32 on the CPU, where 16-bit arithmetic is slow or missing."""
    import torch

    return on_cuda if device.type == "cuda" else torch.float32


def describe(device: torch.device) -> str:
    """One line for humans and measurements: the card's name and memory, or the CPU's thread count."""
    import torch

    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, torch {torch.__version__}"


def multiplies_float8(device: torch.device) -> bool:
    """Whether a CUDA device has 8-bit floats in its tensor cores: RTX 40 and later. True for the CPU, where it is the
    same arithmetic."""
    import torch

    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


LIBRARIES = 2**28
"""Bytes that CUDA's libraries load into video memory, outside torch's allocator, after the context is there."""


def free_vram(device: torch.device) -> int | None:
    """Bytes of video memory that torch's allocator can get from now on, all it holds included; None for the CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free + torch.cuda.memory_reserved(device) - LIBRARIES)


@contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """While a `with` lasts, the allocator reserves at most `limit` bytes of video memory; None, and on the CPU: all."""
    import torch

    if device.type != "cuda" or limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def outside_allocator(device: torch.device) -> int:
    """Bytes of video memory in use that torch's allocator does not hold: CUDA's context, libraries, other programs."""
    import torch

    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def release(device: torch.device) -> None:
    """Give freed memory back to the driver, so that the next phase starts from a clean allocator."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that would part what the next phase can use
        torch.cuda.empty_cache()


def _first_sentence(error: Exception) -> str:
    """Of torch's message: how much it tried to allocate."""
    said = str(error).removeprefix("CUDA out of memory. ")
    return said.partition(". ")[0]


@contextmanager
def phase(name: str, device: torch.device, listen: Listener, total: int = 0, unit: str = "") -> Iterator[None]:
    """Announce a phase, time it (synchronized) and report its own peak of video memory.

    Raises ResourceError where the phase runs out of video memory.
    """
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    listen(PhaseStarted(name, total, unit))
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{name}: out of video memory on {describe(device)} "
            f"({torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB were reserved; {_first_sentence(error)})",
            "Ask for a smaller --resolution or --size, fewer --frames, or a smaller profile; please report this plan.",
        ) from error
    if on_gpu:
        torch.cuda.synchronize(device)
    listen(
        PhaseFinished(
            name,
            time.perf_counter() - start,
            torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            torch.cuda.max_memory_reserved(device) if on_gpu else 0,
            outside_allocator(device),
        )
    )
    release(device)
