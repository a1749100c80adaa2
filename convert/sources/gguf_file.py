"""GGUF files: the header read here, the block formats left to the `gguf` package.

Invariants: the header is read without the package and without believing it (counts, lengths and offsets are
compared with the file); a tensor is dequantized when it is read, some rows at a time.

Left out: vocabularies and other arrays of the header, which are skipped, and writing.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError, PlatformError
from lowvram_i2v.safetensors_file import LARGEST_NUMBER, MOST_DIMENSIONS

REMEDY = "It is truncated or damaged: download or copy it again."
TYPES = {  # number: (name, values in a block, bytes of a block)
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)},
    **{40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LARGEST_HEADER = 256 * 2**20  # bytes; vocabularies take up to 20 MB
MOST_ENTRIES = 100_000
LONGEST_NAME = 1024
LONGEST_STRING = 16 * 2**20
LONGEST_KEPT_ARRAY = 64
MOST_STRINGS = 4_000_000  # in an array: vocabularies and merges have under 1 000 000
VALUES_AT_ONCE = 2**21


@dataclass(frozen=True)
class Entry:
    """One tensor: type as in TYPES, shape as torch counts it, first byte from the file's start, length."""

    type: int
    shape: tuple[int, ...]
    start: int
    bytes: int


def open_gguf(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, Any]]:
    """(tensors, name -> type name, metadata). Quantized tensors are announced as float32.

    Raises CheckpointError if the file is damaged or truncated.
    """
    try:
        with path.open("rb") as file:
            entries, metadata = _Reader(path, file).header()
    except (ValueError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: the GGUF header is damaged ({error})", REMEDY) from error
    tensors = {}
    for name, entry in entries.items():
        dtype = PLAIN.get(TYPES[entry.type][0], torch.float32)
        tensors[name] = LazyTensor(entry.shape, dtype, partial(read_tensor, path, entry))
    return tensors, {name: TYPES[entry.type][0] for name, entry in entries.items()}, metadata


class _Reader:
    """Reads the header front to back; any read past the end is an error."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.file = file
        self.path = path
        self.size = path.stat().st_size

    def header(self) -> tuple[dict[str, Entry], dict[str, Any]]:
        if self.bytes(4) != b"GGUF":
            raise ValueError("no GGUF magic")
        version = self.number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF version {version}, 2 and 3 are read", "Use a newer file.")
        tensor_count, key_count = self.number("<Q"), self.number("<Q")
        if tensor_count > MOST_ENTRIES or key_count > MOST_ENTRIES:
            raise ValueError(f"it counts {tensor_count} tensors and {key_count} keys")
        metadata = {}
        for _ in range(key_count):
            key = self.string(LONGEST_NAME)
            metadata[key] = self.value(self.number("<I"))
        found = [self.tensor(metadata) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"alignment {alignment!r:.50}")
        start = -(-self.file.tell() // alignment) * alignment
        entries = {name: Entry(kind, shape, start + at, size) for name, kind, shape, at, size in found}
        if len(entries) != len(found):
            raise ValueError("a tensor is named twice")
        end = max((entry.start + entry.bytes for entry in entries.values()), default=start)
        if end > self.size:
            raise CheckpointError(f"{self.path} is truncated: {self.size} bytes, its header describes {end}", REMEDY)
        return entries, metadata

    def tensor(self, metadata: dict[str, Any]) -> tuple[str, int, tuple[int, ...], int, int]:
        """name, type, shape, first byte from the data's start, length."""
        name = self.string(LONGEST_NAME)
        dimensions = self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        if max(shape, default=0) > LARGEST_NUMBER:
            raise ValueError(f"{name} is {list(shape)}")
        kind, at = self.number("<I"), self.number("<Q")
        if kind not in TYPES:
            raise ValueError(f"{name} has the unknown type {kind}")
        label, per_block, block_bytes = TYPES[kind]
        if (shape[-1] if shape else 1) % per_block:
            raise ValueError(f"{name}: rows of {shape[-1]} values do not hold whole blocks of {label}")
        count = math.prod(shape)
        original = metadata.get(f"comfy.gguf.orig_shape.{name}")
        if isinstance(original, list) and all(type(size) is int and size > 0 for size in original):
            if math.prod(original) != count:
                raise ValueError(f"{name} is {list(shape)}, and was {original}")
            shape = tuple(original)
        return name, kind, shape, at, count // per_block * block_bytes

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the header; of a long array only that it is there (None)."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string(LONGEST_STRING)
        if kind != ARRAY or depth:
            raise ValueError(f"unknown kind of value {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS and count > LONGEST_KEPT_ARRAY:
            self.skip(count * struct.calcsize(SCALARS[kind]))
            return None
        if count > MOST_STRINGS or kind not in (*SCALARS, STRING):
            raise ValueError(f"an array of {count} values of kind {kind}")
        if count <= LONGEST_KEPT_ARRAY:
            return [self.value(kind, depth + 1) for _ in range(count)]
        for _ in range(count):
            self.skip(self.number("<Q"))
        return None

    def string(self, longest: int) -> str:
        length = self.number("<Q")
        if length > longest:
            raise ValueError(f"a string of {length} bytes")
        return self.bytes(length).decode("utf-8", errors="replace")

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.bytes(struct.calcsize(format)))[0]

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count or self.file.tell() > LARGEST_HEADER:
            raise ValueError("it ends inside the header")
        return data

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise ValueError("it ends inside the header")
        self.file.seek(count, 1)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor, dequantized to float32 unless it is stored plainly. Raises CheckpointError if the file is cut."""
    label, per_block, block_bytes = TYPES[entry.type]
    if label in PLAIN:
        return _read_bytes(path, entry.start, entry.bytes).view(PLAIN[label]).reshape(entry.shape)
    dequantize = dequantizer(label)
    result = torch.empty(math.prod(entry.shape))
    blocks = max(1, VALUES_AT_ONCE // per_block)
    for first in range(0, entry.bytes // block_bytes, blocks):
        count = min(blocks, entry.bytes // block_bytes - first)
        data = _read_bytes(path, entry.start + first * block_bytes, count * block_bytes)
        values = dequantize(data.reshape(count, block_bytes).numpy())
        result[first * per_block : (first + count) * per_block] = torch.from_numpy(values).reshape(-1)
    return result.reshape(entry.shape)


def _read_bytes(path: Path, start: int, count: int) -> Tensor:
    buffer = torch.empty(count, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(start)
        done = file.readinto(buffer.numpy().data) if count else 0
    if done != count:
        raise CheckpointError(f"{path} ends {count - done} bytes before the end of a tensor", REMEDY)
    return buffer


def dequantizer(label: str) -> Any:
    """numpy uint8 [blocks, bytes of a block] -> float32 [blocks, values]. Raises PlatformError without the `gguf`
    package, CheckpointError for a type that it cannot dequantize."""
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise PlatformError("GGUF files need the Python package gguf", "pip install gguf") from error
    kind = getattr(GGMLQuantizationType, label, None)
    if kind is None:
        raise CheckpointError(f"this version of the gguf package does not know {label}", "pip install -U gguf")
    return lambda blocks: dequantize(blocks, kind)


def check_types(path: Path, labels: dict[str, str]) -> None:
    """Raises CheckpointError or PlatformError now if a type in the file cannot be dequantized later."""
    import numpy

    sizes = {name: block_bytes for name, _, block_bytes in TYPES.values()}
    for label in sorted(set(labels.values()) - PLAIN.keys()):
        try:
            dequantizer(label)(numpy.zeros((1, sizes[label]), dtype=numpy.uint8))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{path} has tensors of type {label}, which the gguf package cannot dequantize",
                "Use a file of another quantization.",
            ) from error
