"""The tokenizer's key-values of a GGUF file: the long arrays that the reader of tensors skips.

Invariant: as there, counts and lengths are compared with the file before they are used, and any read past its end is
an error.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from lowvram_i2v.convert.sources.gguf_file import ARRAY, REMEDY, SCALARS, STRING
from lowvram_i2v.errors import CheckpointError

PREFIX = "tokenizer."
LONGEST = 2**24  # bytes of a string, elements of an array


def read_vocabulary(path: Path) -> dict[str, Any]:
    """All `tokenizer.*` of a GGUF file: key -> number, string, or list of them.

    Raises CheckpointError if the header is damaged.
    """
    found = {}
    try:
        with path.open("rb") as file:
            file.seek(16)  # magic, version, number of tensors
            for _ in range(_number(file, "<Q")):
                key, kind = _string(file), _number(file, "<I")
                value = _value(file, kind)
                if key.startswith(PREFIX):
                    found[key] = value
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: the GGUF header is damaged ({error})", REMEDY) from error
    return found


def _value(file: IO[bytes], kind: int) -> Any:
    if kind in SCALARS:
        return _number(file, SCALARS[kind])
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        raise ValueError(f"unknown kind of value {kind}")
    kind, count = _number(file, "<I"), _bounded(_number(file, "<Q"))
    if kind == STRING:
        return [_string(file) for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"an array of kind {kind}")
    size = struct.calcsize(SCALARS[kind])
    return list(struct.unpack(f"<{count}{SCALARS[kind][1]}", _bytes(file, count * size)))


def _string(file: IO[bytes]) -> str:
    return _bytes(file, _bounded(_number(file, "<Q"))).decode()


def _number(file: IO[bytes], format: str) -> Any:
    return struct.unpack(format, _bytes(file, struct.calcsize(format)))[0]


def _bounded(count: int) -> int:
    if count > LONGEST:
        raise ValueError(f"a length of {count}")
    return count


def _bytes(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it ends inside the header")
    return data
