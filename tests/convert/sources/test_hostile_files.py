"""Pickles and GGUF files that lie: always a CheckpointError or the tensors, never code, a hang, or much memory."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_i2v.convert.sources.containers import open_container
from lowvram_i2v.convert.sources.pickles import pickle_tensors, small_pickle
from lowvram_i2v.errors import CheckpointError

MUTATIONS = 150
DEFAULT = object()


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def refused(path: Path, words: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=words):
        pickle_tensors(path)


def repacked(path: Path, data_pkl: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with another pickle in it, by torch's own writer, or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    if data_pkl is not None:
        records = {name: data_pkl if name.endswith("data.pkl") else data for name, data in records.items()}
    if compression != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
        return path
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records.items():
        bare = name.split("/", 1)[1]
        if bare in ("data.pkl", "byteorder") or bare.startswith("data/"):
            writer.write_record(bare, data, len(data))
    writer.write_end_of_file()
    return path


def saved(path: Path, values: Any = DEFAULT) -> Path:
    torch.save(tensors() if values is DEFAULT else values, path)
    return path


def test_a_repacked_archive_is_read(tmp_path: Path) -> None:
    """So that the refusals below are for what they change."""
    read = pickle_tensors(repacked(saved(tmp_path / "x.pt")))
    assert all(torch.equal(read[name].read(), value) for name, value in tensors().items())


class Bomb:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "bomb",
    [
        Bomb(os.system, "touch ran"),
        Bomb(eval, "open('ran', 'w')"),
        Bomb(bytearray, 2**40),
        Bomb(torch.FloatTensor, 2**40),
        Bomb(set, [1]),
    ],
    ids=lambda bomb: getattr(bomb.call[0], "__name__", "tensor"),
)
def test_calls_are_refused_unseen(
    bomb: Bomb, old_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(2), "b": bomb}, path, _use_new_zipfile_serialization=not old_format)
    refused(path, "which is not a tensor")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError):
        small_pickle(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    refused(repacked(saved(tmp_path / "x.pt"), compression=zipfile.ZIP_DEFLATED), "is compressed")
    bomb = repacked(saved(tmp_path / "y.pt"), b"\x80\x02" + b"0" * 2**24, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    refused(bomb, "is compressed")


def test_a_large_pickle_is_not_read(tmp_path: Path) -> None:
    refused(repacked(saved(tmp_path / "x.pt"), b"N0" * 2**22 + b"."), r"data\.pkl has 8388609 bytes")


@pytest.mark.parametrize("data", [b"\x80\x02}.", b"\x80\x02]q\0h\0a.", b"\x80\x02}q\0X\x06\0\0\0moduleh\0s."])
def test_containers_without_tensors(data: bytes, tmp_path: Path) -> None:
    """An empty table, a list in itself, a table that wraps itself for ever."""
    refused(repacked(saved(tmp_path / "x.pt"), data))


def test_a_name_that_takes_for_ever_to_hash(tmp_path: Path) -> None:
    """A tuple of one tuple twice, 60 levels deep, as a key."""
    levels = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
    refused(repacked(saved(tmp_path / "x.pt"), b"\x80\x02})q\0" + levels + b"K\x01s."), "contain each other")


@pytest.mark.parametrize("value", [2**40, 2**31 - 1, 13])
def test_sizes_must_agree_with_the_records(value: int, tmp_path: Path) -> None:
    """The number of elements of a storage, changed in the pickle."""
    path = saved(tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    twelve = b"cpuq" + data.split(b"cpuq")[1][:1] + b"K\x0c"
    assert data.count(twelve) == 1
    number = b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x06" + value.to_bytes(6, "little")
    refused(repacked(path, data.replace(twelve, twelve[:-2] + number)))


def test_expanded_tensors_are_refused(tmp_path: Path) -> None:
    """One value, declared as 2**60 of them."""
    refused(saved(tmp_path / "x.pt", {"a": torch.zeros(1).expand(2**30, 2**30)}), "of 4 bytes")


@pytest.mark.parametrize("value", [3, "text", None, [1], {"a": 1}, torch.zeros(2).to_sparse(), torch.nn.Linear(2, 2)])
def test_entries_that_are_no_weights(value: Any, tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", {"a": torch.zeros(2), "b": value}))
    refused(saved(tmp_path / "x.pt", value))


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", {3: torch.zeros(2)}), "int: not a name")


def test_a_record_twice_or_outside(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    refused(path, "names a record twice")


def test_a_big_endian_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    refused(path, "byte order")


def test_an_old_file_that_counts_too_much(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x0cN") == 1
    path.write_bytes(data.replace(b"K\x0cN", b"J\xff\xff\xff\x7fN"))
    refused(path, "it counts 2147483647")


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    opened = pickle_tensors(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="before the end of a tensor"):
        opened["a.weight"].read()


def gguf_bytes(folder: Path) -> bytes:
    path = folder / "x.gguf"
    writer = GGUFWriter(str(path), "hyvid")
    writer.add_array("some.words", ["a", "bc"])
    writer.add_array("some.numbers", list(range(100)))
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0):
        writer.add_tensor(f"t.{kind.name}", quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf_original_shapes(tmp_path: Path) -> None:
    """As tools mark tensors that they had to flatten."""
    writer = GGUFWriter(str(tmp_path / "x.gguf"), "hyvid")
    writer.add_array("comfy.gguf.orig_shape.a", [2, 3, 1, 2, 2])
    writer.add_tensor("a", np.arange(24, dtype=np.float32).reshape(6, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_container(tmp_path / "x.gguf").tensors["a"]
    assert tensor.shape == (2, 3, 1, 2, 2)
    assert torch.equal(tensor.read().reshape(-1), torch.arange(24.0))


@pytest.mark.parametrize("at", ["tensors", "keys"])
def test_gguf_counts_that_lie(at: str, tmp_path: Path) -> None:
    data = bytearray(gguf_bytes(tmp_path))
    offset = 8 if at == "tensors" else 16
    for value in (2**63, 2**40, 50_000):
        data[offset : offset + 8] = struct.pack("<Q", value)
        (tmp_path / "y.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            open_container(tmp_path / "y.gguf")


@pytest.mark.parametrize("version", [0, 1, 4])
def test_gguf_versions(version: int, tmp_path: Path) -> None:
    data = bytearray(gguf_bytes(tmp_path))
    data[4:8] = struct.pack("<I", version)
    (tmp_path / "y.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"GGUF version {version}"):
        open_container(tmp_path / "y.gguf")


@pytest.mark.parametrize("off", [17, 33, 200, 400, 600])
def test_gguf_truncated(off: int, tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path)
    (tmp_path / "y.gguf").write_bytes(data[:-off])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        open_container(tmp_path / "y.gguf")


Edits = list[tuple[int, bytes]]
EDITS = st.lists(
    st.tuples(st.integers(0, 4000), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8))),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, edits: Edits, cut: int) -> bytes:
    result = bytearray(data)
    for at, new in edits:
        at %= len(result)
        result[at : at + len(new)] = new[: len(result) - at]
    return bytes(result[: len(result) - cut])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    torch.save(tensors(), folder / "zip.pt")
    torch.save(tensors(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return {
        "zip": (folder / "zip.pt").read_bytes(),
        "old": (folder / "old.pt").read_bytes(),
        "gguf": gguf_bytes(folder),
        "pickle": pickle.dumps({"a": 1}, protocol=2),
    }


@pytest.mark.parametrize("kind", ["zip", "old", "gguf", "pickle"])
@given(edits=EDITS, cut=st.sampled_from([0, 0, 0, 1, 40, 200]))
@settings(max_examples=MUTATIONS)
def test_any_damage_is_an_error_or_tensors(
    kind: str, edits: Edits, cut: int, samples: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"mutated_{kind}_{os.getpid()}"
    path.write_bytes(mutated(samples[kind], edits, cut))
    try:
        opened = open_container(path).tensors
        for tensor in opened.values():
            if tensor.bytes < 2**20:
                assert tuple(tensor.read().shape) == tensor.shape
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
