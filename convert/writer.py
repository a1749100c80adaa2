"""Writes safetensors files in a streaming way: the header first, then one tensor at a time.

Invariants: memory holds one tensor; a file appears under its final name only when it is complete and on the
disk, else not at all; a disk that is too small is noticed before anything is written. Tensors follow each
other without holes (the format allows none) in the order given, and the first one starts at a multiple of
64 bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError
from lowvram_i2v.safetensors_file import TORCH_DTYPES

ALIGNMENT = 64
DTYPE_NAMES = {getattr(torch, ours): theirs for theirs, ours in TORCH_DTYPES.items()}


def header_bytes(tensors: dict[str, LazyTensor], metadata: dict[str, str]) -> bytes:
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
    """Writes `tensors` in their order to `path`; the caller makes that appear at once (`replacing`).

    advance is called with the bytes done after each tensor. Raises CheckpointError if a tensor turns out to
    be other than was announced.
    """
    done = 0
    with path.open("wb") as file:
        file.write(header_bytes(tensors, metadata))
        for name, tensor in tensors.items():
            values = tensor.read()
            if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{name} was announced as {tensor.dtype} {list(tensor.shape)} and came as {values.dtype} "
                    f"{list(values.shape)}",
                    "The source changed while it was read: convert again.",
                )
            # each tensor passes here once, in the file's own bytes: the place for checksums
            file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done += tensor.bytes
            advance(done)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on the disk, when the block ends well.

    Otherwise it is removed and `path` stays as it was. What a killed process leaves behind is overwritten
    next time.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
