"""Writes safetensors files in a streaming way: the header first, then tensors as they become ready.

    read a source tensor -> make the file's tensors of it (CPU or GPU) -> checksum -> write at their offsets

runs in several threads at once, each with another tensor, so reading, arithmetic and writing overlap: file access,
torch and hashlib all let other threads run.

Invariants: what is in memory is bounded in bytes, not in tensors; a file appears under its final name only when it is
complete and on the disk, else not at all; a disk that is too small is noticed before anything is written. Tensors
follow each other without holes (the format allows none) in the order given, and the first one starts at a multiple of
64 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowvram_i2v import whole_file
from lowvram_i2v.convert.policy import Job, Layout, StoredTensor
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError
from lowvram_i2v.kernels.chunks import row_chunks
from lowvram_i2v.kernels.scheme import QuantScheme
from lowvram_i2v.safetensors_file import TORCH_DTYPES

ALIGNMENT = 64
IN_FLIGHT = 2**30
"""Bytes of tensors in memory, as read and as made; one that is larger is handled alone."""
SCRATCH = 64 * 2**20
"""Bytes that a thread needs beside the tensor it works on."""
MOST_JOBS = 5
"""Jobs at a time: one or two wait for a disk, the others share the cores."""
EARLY = 2**20  # bytes of a tensor that is sent to the disk at once
DTYPE_NAMES = {getattr(torch, ours): theirs for theirs, ours in TORCH_DTYPES.items()}
CPU = torch.device("cpu")
PART = ".lowvram-i2v.part"
"""Ends the name of a file that is being written; no other program's unfinished files are called so."""
DEEPEST = 3  # levels of the deepest file that is written: the released tree's
DISK_REMEDY = "Is the disk full, or was it removed?"


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Written:
    """checksums: tensor name -> sha256 of its bytes, in hexadecimal. errors: quantized layer -> relative L2 error of
    its weight."""

    checksums: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def header_bytes(tensors: Mapping[str, Described], metadata: dict[str, str]) -> bytes:
    """The file up to the first tensor."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.bytes
        entry = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        header[name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str], advance: Callable[[int], None]
) -> None:
    """Writes `tensors` as they are, in their order, to `path`; the caller makes that appear at once (`replacing`).

    advance is called with the bytes done after each tensor. Raises CheckpointError if a tensor turns out to
    be other than was announced.
    """
    stored = tuple(StoredTensor(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())

    def as_it_is(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
        return lambda values: {name: values}

    jobs = tuple(Job((name,), tensor, as_it_is(name)) for name, tensor in tensors.items())
    write_layout(path, Layout(stored, jobs), metadata, CPU, advance)


def write_layout(
    path: Path, layout: Layout, metadata: dict[str, str], device: torch.device, advance: Callable[[int], None]
) -> Written:
    """Carries out the jobs of `layout`, on `device`, and writes their results to `path`.

    advance is called in this thread with the bytes done. Raises CheckpointError if a tensor turns out to be other than
    was announced, ResourceError if memory or disk do not suffice.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    header = header_bytes(tensors, metadata)
    offsets, end = {}, len(header)
    for tensor in layout.tensors:
        offsets[tensor.name] = end
        end += tensor.bytes
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        file.truncate(end)
        return run_jobs(layout, Sink(file.fileno(), offsets, tensors), device, advance)


@dataclass(frozen=True)
class Sink:
    """An open file with a place for each tensor. offsets: name -> first byte."""

    descriptor: int
    offsets: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]

    def write(self, name: str, values: Tensor) -> str:
        """Writes a tensor; returns the sha256 of its bytes."""
        expected = self.tensors[name]
        if tuple(values.shape) != expected.shape or values.dtype != expected.dtype:
            raise CheckpointError(
                f"{name} was announced as {expected.dtype} {list(expected.shape)} and came as {values.dtype} "
                f"{list(values.shape)}",
                "The source changed while it was read: convert again.",
            )
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], self.offsets[name] + done)
        if len(data) >= EARLY and hasattr(os, "posix_fadvise"):  # the disk starts now, not when the file is complete
            os.posix_fadvise(self.descriptor, self.offsets[name], len(data), os.POSIX_FADV_DONTNEED)
        return hashlib.sha256(data).hexdigest()


def run_jobs(layout: Layout, sink: Sink, device: torch.device, advance: Callable[[int], None]) -> Written:
    """All jobs, each in a thread, while the tensors in flight fit into IN_FLIGHT bytes."""
    written, done, in_flight = Written(), 0, 0
    running: dict[Future[Written], tuple[int, int]] = {}
    pool = ThreadPoolExecutor(MOST_JOBS, "convert")

    def collect() -> None:
        nonlocal done, in_flight
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            result, (size, cost) = future.result(), running.pop(future)
            written.checksums.update(result.checksums)
            written.errors.update(result.errors)
            done, in_flight = done + size, in_flight - cost
            advance(done)

    with _shared_cores(MOST_JOBS - 1):
        try:
            for job in layout.jobs:
                size = sum(sink.tensors[name].bytes for name in job.names)
                cost = _cost(job, size, device)
                while running and in_flight + cost > IN_FLIGHT:
                    collect()
                running[pool.submit(_run, job, sink, device)] = size, cost
                in_flight += cost
            while running:
                collect()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of video memory: {str(error).splitlines()[0]}", "Free some of it, or convert with --device cpu."
            ) from error
        except OSError as error:
            raise ResourceError(f"reading or writing failed: {error}", DISK_REMEDY) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return Written({name: written.checksums[name] for name in sink.offsets}, written.errors)


def _cost(job: Job, size: int, device: torch.device) -> int:
    """Bytes of host memory that a job holds at once: what is read and what is made and, for a weight that is quantized
    on the CPU, its values after quantization in 16 bits. Other work is done in small pieces (`policy.cast`)."""
    held = job.source.bytes + size
    if device == CPU and len(job.names) > 1:
        held += SCRATCH
    if device == CPU and job.quantizes:
        held += 2 * torch.Size(job.source.shape).numel()
    return held


def _run(job: Job, sink: Sink, device: torch.device) -> Written:
    """One job, start to end. What is not quantized does not go through a GPU: the way there is longer than the
    work."""
    values = job.source.read()
    if device != CPU and job.quantizes:
        values = values.to(device)
    made = job.make(values)
    errors = _errors(job, values, made)
    del values
    return Written({name: sink.write(name, made.pop(name)) for name in job.names}, errors)


def _errors(job: Job, weight: Tensor, made: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of a weight that was quantized here; nothing for other jobs."""
    if job.quantizes is None:
        return {}
    layer, scheme = job.quantizes
    parts = {name.rpartition(".")[2]: part for name, part in made.items()}
    return {layer: weight_error(weight, parts, scheme)}


def weight_error(weight: Tensor, parts: dict[str, Tensor], scheme: QuantScheme) -> float:
    """|dequantized - weight| / |weight|, 0 for a weight of zeros.

    Dequantized to float16, whose own rounding, 0.02 %, is nothing beside any scheme's, and half of float32's memory.
    """
    rows, columns = weight.shape
    dequantized = scheme.dequantize(parts, torch.float16, (rows, columns))
    return relative_error(weight, dequantized)


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """|actual - expected| / |expected| of two tensors of one shape, in float32 and small pieces; 0 where both are 0."""
    expected, actual = expected.reshape(-1), actual.reshape(-1)
    wrong = right = 0.0
    for piece in row_chunks(len(expected), 1):
        values = expected[piece].float()
        right += float(values.dot(values))
        values = values - actual[piece]
        wrong += float(values.dot(values))
    if not wrong:
        return 0.0
    return math.sqrt(wrong / right) if right else math.inf


@contextmanager
def _shared_cores(threads: int) -> Iterator[None]:
    """torch's own threads, divided among threads that start inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`whole_file.replacing` with a name that the next run knows: it overwrites or removes what a killed one left.

    Raises ResourceError if the folder of `path`, which is made, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file.replacing(path, path.with_name(path.name + PART)) as part:
            yield part
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}", DISK_REMEDY) from error


@contextmanager
def only_writer(folder: Path, needed: int = 0) -> Iterator[None]:
    """Makes `folder` if need be and keeps other conversions out of it while the block lasts; removes what a killed one
    has left.

    needed: bytes that are going to be written. Raises ResourceError if the disk has fewer free, before the folder is
    made or, where it is there, after the leftovers are gone; RequestError if another process is writing there. The lock
    goes with its process, however that ends. Left out: systems without file locks, where two conversions into one
    folder must not overlap.
    """
    if not folder.exists():
        require_space(folder, needed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error}", DISK_REMEDY) from error
    try:
        _remove_leftovers(folder)
        require_space(folder, needed)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Raises ResourceError if one cannot be removed."""
    for level in range(DEEPEST):
        for leftover in folder.glob("*/" * level + f"*{PART}"):
            try:
                if leftover.is_file():
                    leftover.unlink()
            except OSError as error:
                raise ResourceError(f"{leftover}, left by a killed run, cannot be removed: {error}") from error


def _lock(folder: Path) -> int | None:
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RequestError(
            f"another process is writing into {folder}", "Wait for it, or choose another folder."
        ) from error
    except OSError:  # network file systems that lock no folders
        os.close(descriptor)
        return None
    return descriptor


def nearest_folder(path: Path) -> Path:
    """`path` or its first ancestor that exists. Raises RequestError if that is not a folder."""
    for folder in (path, *path.parents):
        if folder.exists():
            if folder.is_dir():
                return folder
            raise RequestError(f"{folder} is a file, not a folder", "Choose another destination.")
    raise RequestError(f"{path} has no existing parent folder", "Choose another destination.")


def require_writable(folder: Path) -> None:
    """Raises RequestError if nothing can be written into `folder`, which need not exist yet."""
    existing = nearest_folder(folder.absolute())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise RequestError(f"{existing} is not writable: {error.strerror}", "Choose another destination.") from error


def require_space(folder: Path, needed: int) -> None:
    """Raises ResourceError if the disk of `folder`, which need not exist yet, has fewer bytes free."""
    existing = nearest_folder(folder.absolute())
    free = shutil.disk_usage(existing).free
    if free < needed:
        wanted, there = (f"{amount / 2**30:.2f} GiB" for amount in (needed, free))
        raise ResourceError(
            f"{folder} needs {wanted}, and the disk of {existing} has {there} free",
            "Free some space, choose another disk, or write one component at a time (--component).",
        )
