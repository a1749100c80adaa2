"""Copy queues for tests: one that lands copies as late as it may, one that runs both queues in a random order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

POISON = 0xFF
"""A byte that, repeated, is not a number in every float format of 8 bits or more."""


@dataclass
class DelayedCopy:
    """Computing happens at once; a copy poisons its target when it is queued and lands when it is waited for.

    copies: (address of the target, bytes) of every copy. used: address -> when computing last needed it to stay;
    a test that uses a slot says so with `use`.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    under_way: deque[tuple[int, Tensor, Tensor]] = field(default_factory=deque)
    clock: int = 0
    used: dict[int, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def use(self, address: int) -> None:
        self.clock += 1
        self.used[address] = self.clock

    def computed(self) -> int:
        return self.clock

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        assert target.shape == source.shape
        assert after >= self.used.get(target.data_ptr(), 0), "overwritten before its block was computed"
        with self.lock:
            target.fill_(POISON)
            self.copies.append((target.data_ptr(), len(target)))
            self.under_way.append((len(self.copies), target, source))
            return len(self.copies)

    def wait_copied(self, landed: int) -> None:
        with self.lock:
            while self.under_way and self.under_way[0][0] <= landed:
                _, target, source = self.under_way.popleft()
                target.copy_(source)

    def await_copied(self, landed: int) -> None:
        self.wait_copied(landed)

    def finish(self) -> None:
        self.wait_copied(len(self.copies))


class TwoQueues:
    """Two queues that run later, in any order that their marks allow. A copy is two operations, so that computing may
    come between them, and finds poison."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.preference = self.random.choice((0.01, 0.2, 0.5, 0.8, 0.99))
        self.queues: tuple[deque[tuple[str, object]], ...] = (deque(), deque())
        self.computing, self.copying = self.queues
        self.marks = 0
        self.reached: set[int] = set()
        self.copies = 0

    def _mark(self, queue: deque[tuple[str, object]]) -> int:
        self.marks += 1
        queue.append(("mark", self.marks))
        return self.marks

    def compute(self, work: Callable[[], None]) -> None:
        self.computing.append(("run", work))

    def computed(self) -> int:
        return self._mark(self.computing)

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        assert target.shape == source.shape
        self.copies += 1
        self.copying.append(("wait", after))
        self.copying.append(("run", lambda: target.fill_(POISON)))
        self.copying.append(("run", lambda: target.copy_(source)))
        return self._mark(self.copying)

    def wait_copied(self, landed: int) -> None:
        self.computing.append(("wait", landed))

    def await_copied(self, landed: int) -> None:
        """Runs both queues, in a random order, until the mark is reached."""
        while landed not in self.reached:
            self.run_one()

    def finish(self) -> None:
        """Runs all that is queued."""
        while any(self.queues):
            self.run_one()

    def run_one(self) -> None:
        """One operation of one queue. How often the one queue is preferred is drawn once, so that extremes occur."""
        able = self.able()
        assert able, "both queues wait for each other, or for what nobody has queued"
        queue = self.computing if self.random.random() < self.preference else self.copying
        self._run((queue if queue in able else able[0]).popleft())

    def able(self) -> list[deque[tuple[str, object]]]:
        """The queues that can go on."""
        return [queue for queue in self.queues if queue and not self._blocked(queue[0])]

    def _blocked(self, operation: tuple[str, object]) -> bool:
        return operation[0] == "wait" and operation[1] not in self.reached

    def _run(self, operation: tuple[str, object]) -> None:
        kind, value = operation
        if kind == "run":
            assert callable(value)
            value()
        elif kind == "mark":
            assert isinstance(value, int)
            self.reached.add(value)
