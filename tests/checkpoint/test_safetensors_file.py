"""The safetensors header reader: whatever bytes it is given, a clear error or the same answer as the library's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import open_safetensors

GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def with_header(header: Any, data: bytes = GOOD[HEADER_END:]) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """The one tensor that 32 bytes of data hold, with changes."""
    values = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} | changes
    return {"a": {key: value for key, value in values.items() if value is not None}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        GOOD[:HEADER_END],
        GOOD[:-1],
        GOOD + b"x",
        b"\xff" * 8 + GOOD[8:],
        GOOD[8:],
        with_header(b"\xff\xfe{}"),
        with_header(b"[" * 50_000),
        with_header([1, 2]),
        with_header({"a": 3}),
        with_header({"__metadata__": 3}),
        with_header(entry(dtype=None)),
        with_header(entry(dtype=["F32"])),
        with_header(entry(dtype="F33")),
        with_header(entry(shape=None)),
        with_header(entry(shape=[-8])),
        with_header(entry(shape=[True] * 3 + [8])),
        with_header(entry(shape=[2.0, 4])),
        with_header(entry(shape=[9])),
        with_header(entry(shape=[2**62, 4])),
        with_header(entry(data_offsets=[0])),
        with_header(entry(data_offsets=[32, 0])),
        with_header(entry(data_offsets=["0", "32"])),
        with_header(entry(data_offsets=[4, 36])),
        with_header(entry() | {"b": entry()["a"]}),
        with_header(entry(shape=[7], data_offsets=[0, 28])),
    ],
)
def test_damaged_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_safetensors(path)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_safetensors(path)


@given(
    st.integers(0, len(GOOD) - 1),
    st.binary(max_size=3),
    st.integers(0, 3),
)
def test_any_mutation_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes, removed: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "x"
    path.write_bytes(GOOD[:at] + new + GOOD[at + removed :])
    try:
        file = open_safetensors(path)
    except CheckpointError:
        return
    ours = {name: file.read(name) for name in file.entries}
    try:
        theirs = load_file(path)
    except SafetensorError:
        pytest.fail("the library refuses what we read")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(GOOD)
    file = open_safetensors(path)
    path.write_bytes(GOOD[:-1])
    last = max(file.entries, key=lambda name: file.entries[name].start)
    with pytest.raises(CheckpointError, match="ends 1 bytes before"):
        file.read(last)
