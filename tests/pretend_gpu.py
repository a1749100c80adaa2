"""What a GPU run would allocate, counted without one: meta tensors, Triton kernels that do nothing, torch's allocator.

The code that allocates is the real one, at full size; only bytes are followed, in the order in which they come and go.
`Allocator` is how torch's caching allocator behaves with expandable segments: what it reserves grows by pages, and a
freed block is used again by what fits into it. Left out: what libraries allocate inside an operation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
GRAIN, SMALL, SMALL_PAGE, LARGE_PAGE = 512, 2**20, 2 * 2**20, 20 * 2**20


class Pool:
    """One expandable segment: a line of addresses, mapped from the left; what is free of it, by place."""

    def __init__(self, page: int) -> None:
        self.page, self.mapped = page, 0
        self.free: list[tuple[int, int]] = []  # (start, bytes), ascending, never touching

    def take(self, size: int) -> int:
        """The smallest free block that is large enough, else the end, which grows."""
        fitting = [(length, start) for start, length in self.free if length >= size]
        if not fitting:
            start, length = self.free[-1] if self.free and sum(self.free[-1]) == self.mapped else (self.mapped, 0)
            grown = -(-(size - length) // self.page) * self.page
            if length:
                self.free.pop()
            self.mapped += grown
            self.free.append((start, length + grown))
            fitting = [(length + grown, start)]
        length, start = min(fitting)
        self.free.remove((start, length))
        if length > size:
            insort(self.free, (start + size, length - size))
        return start

    def give(self, start: int, size: int) -> None:
        place = bisect_left(self.free, (start, size))
        if place < len(self.free) and self.free[place][0] == start + size:
            size += self.free.pop(place)[1]
        if place and sum(self.free[place - 1]) == start:
            start, before = self.free.pop(place - 1)
            size += before
        insort(self.free, (start, size))


class Allocator:
    """Bytes now and at most: allocated (rounded as the allocator does), and reserved."""

    def __init__(self) -> None:
        self.small, self.large = Pool(SMALL_PAGE), Pool(LARGE_PAGE)
        self.allocated = self.most_allocated = self.most_reserved = 0

    def take(self, size: int) -> tuple[int, int]:
        size = -(-size // GRAIN) * GRAIN
        start = (self.small if size <= SMALL else self.large).take(size)
        self.allocated += size
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.small.mapped + self.large.mapped)
        return start, size

    def give(self, start: int, size: int) -> None:
        (self.small if size <= SMALL else self.large).give(start, size)
        self.allocated -= size


class Followed(TorchDispatchMode):
    """While a `with` lasts, what operations allocate on the meta device goes through an `Allocator`."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self.allocator = allocator
        self.alive: dict[int, tuple[StorageWeakRef, tuple[int, int] | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _on_meta((args, kwargs)):  # what was there before is not ours
            self._known(tensor, ours=False)
        self.reap()
        result = func(*args, **(kwargs or {}))
        for tensor in _on_meta(result):
            self._known(tensor, ours=True)
        return result

    def reap(self) -> None:
        """Storages that nothing holds any more are free."""
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            _, block = self.alive.pop(key)
            if block is not None:
                self.allocator.give(*block)

    def _known(self, tensor: torch.Tensor, *, ours: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            block = self.allocator.take(storage.nbytes()) if ours and storage.nbytes() else None
            self.alive[key] = StorageWeakRef(storage), block


def _on_meta(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_meta)


@contextmanager
def silent_kernels() -> Iterator[None]:
    """While a `with` lasts, Triton kernels are launched but do nothing."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launch(*args: object, **kwargs: object) -> None:
        """Nothing."""

    def launcher(kernel: object, grid: object) -> Callable[..., None]:
        return launch

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "__getitem__", launcher, create=True))
        yield
