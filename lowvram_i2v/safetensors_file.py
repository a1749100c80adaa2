"""One safetensors file: its header, checked, and one tensor at a time.

Invariants: nothing is mapped into memory, a tensor is read into an aligned buffer of its own, so a file
that shrinks is an error and not a crash; a header whose tensors overlap or leave holes, or that lies about
sizes or the file's length, is refused before a byte of data is read. No torch at import: planning reads
headers.

Left out: writing, which is `convert`'s.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_i2v.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BITS = {  # of one element, by the name that safetensors gives the dtype
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
LARGEST_HEADER = 32 * 2**20  # bytes; 1300 tensors take 0.2 MB, and Python's objects are up to 40 times the text
LARGEST_NUMBER = 2**63 - 1
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: dtype as safetensors names it, first byte counted from the file's start, length."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file's header; `read` fetches one tensor."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU as stored, in its own memory. Raises CheckpointError if the file is cut."""
        import torch

        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {entry.dtype}, which torch cannot hold")
        buffer = torch.empty(entry.bytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            done = file.readinto(buffer.numpy().data) if entry.bytes else 0
        if done != entry.bytes:
            raise CheckpointError(f"{self.path} ends {entry.bytes - done} bytes before the end of {name}")
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        return buffer.view(dtype).reshape(entry.shape)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Reads and checks the header: bounds, sizes, no overlap, no hole, and the length of the file.

    Raises CheckpointError if the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or it is cut off inside its header ({size} bytes)",
                    "Copy or download it again.",
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error})", "Copy it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged (not an object)", "Copy it again.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: the safetensors metadata is damaged", "Copy it again.")
    if any("\ud800" <= mark <= "\udfff" for name in header for mark in name):
        raise CheckpointError(f"{path}: the header has names of tensors that are not Unicode", "Copy it again.")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            raise CheckpointError(f"{path}: the header is damaged ({name} does not follow the tensor before it)")
        end += entry.bytes
    if size != end:
        fault = "is truncated" if size < end else "has bytes behind its end"
        raise CheckpointError(f"{path} {fault}: {size} bytes, its header describes {end}", "Copy or download it again.")
    return SafetensorsFile(path, entries, {str(key): str(value) for key, value in metadata.items()})


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    """One entry of the header, checked."""
    fault = CheckpointError(f"{path}: the header's entry for {name!r} is damaged: {value!r:.200}", "Copy it again.")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise fault
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise fault
    if len(shape) > MOST_DIMENSIONS:
        raise fault
    if any(type(number) is not int or not 0 <= number <= LARGEST_NUMBER for number in (*shape, *offsets)):
        raise fault
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}")
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise fault
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])
