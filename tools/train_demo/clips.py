"""The training videos: made by the project's renderer on all cores while the GPU trains, chunk by chunk.

Invariants: clip n of the data set is the same whoever asks for it, whenever; a chunk is a run of clips of one size. So
a run that goes on after a break sees what it would have seen. Nothing is kept on disk: drawing is as fast as reading.
Left out: what a video shows (`scenes.py`), how it is drawn (`render.py`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tools.train_demo.scenes import Scene

REMADE = 8
DEMANDING, OF = 2, 5  # so many clips of so many are demanding, where a stage wants them

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """One video [F, H, W, 3], its prompt, and what the prompt says as one number an attribute (`attributes`)."""

    frames: Frames
    prompt: str
    labels: tuple[int, ...]


Source = Callable[[int, int, tuple[int, int]], Clip]
"""(seed, number, (width, height)) -> the clip. A function of a module, so that other processes can call it."""


def demo_clip(seed: int, number: int, size: tuple[int, int]) -> Clip:
    """Clip `number` of the training split."""
    from tools.train_demo.scenes import draw_scene

    return _rendered(draw_scene(seed, number, size=size))


def demanding_clip(seed: int, number: int, size: tuple[int, int]) -> Clip:
    """As `demo_clip`, with more of the scenes that are learned last (`Script.demanding`) than a fair draw has."""
    from tools.train_demo.scenes import draw_scene

    return _rendered(draw_scene(seed, number, size=size, demanding=number % OF < DEMANDING))


def held_out_clip(seed: int, number: int, size: tuple[int, int]) -> Clip:
    """Clip `number` of the split that training never sees."""
    from tools.train_demo.scenes import draw_scene

    return _rendered(draw_scene(seed, number, held_out=True, size=size))


def small_clip(seed: int, number: int, size: tuple[int, int]) -> Clip:
    """Half as large and half as long as `demo_clip`: for a look at whether everything runs."""
    clip = demo_clip(seed, number, (2 * size[0], 2 * size[1]))
    return replace(clip, frames=np.ascontiguousarray(clip.frames[::2, ::2, ::2]))


def _rendered(scene: Scene) -> Clip:
    from tools.train_demo.attributes import labels
    from tools.train_demo.render import render

    return Clip(np.ascontiguousarray(render(scene)), scene.prompt, labels(scene.script))


@dataclass(frozen=True)
class Chunk:
    """frames uint8 [n, F, H, W, 3], on the CPU."""

    frames: Tensor
    prompts: list[str]
    labels: Tensor


class Clips:
    """Chunks by number. Use it in a `with`: leaving it stops the workers.

    sizes: (width, height) of chunk 0, 1, ..., again from the start. count: clips of a chunk. workers: processes that
    render; 0 renders here, when a chunk is asked for. held_out: clips that training does not see.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        sizes: tuple[tuple[int, int], ...],
        count: int,
        workers: int,
        held_out: Source,
    ) -> None:
        self._source, self._seed, self._sizes, self._count = source, seed, sizes, count
        self._held_out, self.workers = held_out, workers
        self._pending: dict[int, list[Future[Clip]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers:  # fork would copy a process that has a CUDA context and threads
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread)

    @property
    def in_background(self) -> bool:
        """Whether other processes render."""
        return self._pool is not None

    def with_workers(self, workers: int) -> Clips:
        """The same clips, from processes of their own."""
        return Clips(self._source, self._seed, self._sizes, self._count, workers, self._held_out)

    def __reduce__(self) -> Any:
        """Another process gets its own workers."""
        return Clips, (self._source, self._seed, self._sizes, self._count, self.workers, self._held_out)

    def __enter__(self) -> Clips:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def ahead(self, number: int) -> None:
        """Begins with a chunk that will be wanted soon."""
        if self._pool is not None and number not in self._pending:
            self._pending[number] = [self._pool.submit(self._source, *task) for task in self._tasks(number)]

    def get(self, number: int) -> Chunk:
        """The chunk, as soon as it is rendered."""
        self.ahead(number)
        if number in self._pending:
            made = [future.result() for future in self._pending.pop(number)]
        else:
            made = [self._source(*task) for task in self._tasks(number)]
        return _chunk(made)

    def held_out(self, count: int) -> list[Chunk]:
        """The first `count` held-out clips of each size: always the same."""
        chunks = []
        for size in dict.fromkeys(self._sizes):
            made = [self._held_out(self._seed, number, size) for number in range(count)]
            chunks.append(_chunk(made))
        return chunks

    def _tasks(self, number: int) -> list[tuple[int, int, tuple[int, int]]]:
        size, first = self._sizes[number % len(self._sizes)], number * self._count
        return [(self._seed, first + i, size) for i in range(self._count)]


def _chunk(made: list[Clip]) -> Chunk:
    frames = torch.from_numpy(np.stack([clip.frames for clip in made]))
    return Chunk(frames, [clip.prompt for clip in made], torch.tensor([clip.labels for clip in made]))


def save(value: Any, path: Path) -> None:
    """`torch.save` that leaves no half-written file under the name."""
    unfinished = path.with_suffix(".tmp")
    torch.save(value, unfinished)
    os.replace(unfinished, path)


def _one_thread() -> None:
    """Each worker process keeps to one core."""
    torch.set_num_threads(1)


class Coming(Protocol):
    """Where chunks come from: whether others make them, and a hint which one is wanted soon."""

    @property
    def in_background(self) -> bool: ...
    def ahead(self, number: int) -> None: ...


class Window:
    """What each step may draw from: the newest chunks, one more every `steps` steps, each made into what a stage needs.

    make: chunk number -> tensors on the training device; the next chunk is made by a thread while the device trains.
    kept: whether what was made of a chunk lies on disk, for a stage that keeps it there because it is dear: of chunks
    that a run on another machine left behind, only the newest REMADE are made again. None: chunks are cheap.
    patient: wait for a chunk that is late, instead of drawing from those that are there.
    """

    def __init__(
        self,
        clips: Coming,
        make: Callable[[int], dict[str, Tensor]],
        steps: int,
        most: int,
        kept: Callable[[int], bool] | None = None,
        patient: bool = True,
    ) -> None:
        self._clips, self._make, self._steps, self._most, self._kept = clips, make, steps, most, kept
        self._patient = patient
        self._newest = -1
        self._held: dict[int, dict[str, Tensor]] = {}
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._thread = ThreadPoolExecutor(1)

    @property
    def count(self) -> int:
        """Chunks that are there."""
        return len(self._held)

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One of the chunks that step `step` may see, drawn with a CPU generator."""
        newest = step // self._steps
        if newest != self._newest:
            self._move(newest)
        if self._coming:
            self._take(newest)
        numbers = sorted(self._held)
        return self._held[numbers[int(torch.randint(len(numbers), (), generator=generator))]]

    def _move(self, newest: int) -> None:
        oldest = max(0, newest - self._most + 1)
        for number in [number for number in self._held if number < oldest]:
            del self._held[number]
        for number in range(oldest, newest + 1):
            remade = self._kept is None or self._kept(number) or number > newest - REMADE
            if number not in self._held and number not in self._coming and remade:
                self._held[number] = self._make(number)
        if self._clips.in_background:
            if newest + 1 not in self._coming:
                self._coming[newest + 1] = self._thread.submit(self._make, newest + 1)
            self._clips.ahead(newest + 2)  # rendered, not yet made into anything
        self._newest = newest

    def _take(self, newest: int) -> None:
        """What has come and may be seen."""
        for number in [number for number in self._coming if number <= newest]:
            if self._patient or self._coming[number].done() or not self._held:
                self._held[number] = self._coming.pop(number).result()
