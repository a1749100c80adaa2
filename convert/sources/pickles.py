"""Torch pickles, read without running or believing them.

Invariants: only torch's weights-only loader opens a pickle, and only after its opcodes were looked at and name
nothing but tensors and plain containers; it loads onto the meta device, so a declared size allocates nothing;
sizes must agree with the records of the file; a tensor is read from its place in the file like any other.

The older format without a zip archive gives no such places: such a file is read whole.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError

WRAPPERS = ("module", "ema", "state_dict", "model")
DEEPEST_WRAPPING = 4
LARGEST_PICKLE = 4 * 2**20  # bytes of the pickle proper; 1300 tensors take 0.2 MB
OLD_FORMAT_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages
OLD_FORMAT_OBJECT = 3
INTEGERS = ("BININT", "LONG1")
FOREIGN_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "MEMOIZE", "DUP"}
MOST_SHARED_TUPLES = 24  # a tuple of tuples that are one tuple takes for ever to hash
HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch (Size|device|\w+Storage|b?float\w+|double|half|u?int\w+|long|short|bool|complex\w+)"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.serialization _get_layout"
)
REMEDY = "It is truncated, damaged, or holds code, which is never run. Download or copy it again."


class UnfitError(Exception):
    """Why a file is not read; becomes a CheckpointError with its path."""


def pickle_tensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a torch pickle.

    Unwraps `{"module": ...}` and its like, and the `module.` prefix of a parallel-training wrapper.
    Raises CheckpointError for a file that is truncated, damaged, or holds anything but weights.
    """
    values, records = _load(path)
    for _ in range(DEEPEST_WRAPPING):
        key = next((key for key in WRAPPERS if isinstance(values, Mapping) and key in values), None)
        if key is None or not isinstance(values[key], Mapping):
            break
        values = values[key]
    if not isinstance(values, Mapping) or not values:
        raise CheckpointError(f"{path} holds no tensors, but a {type(values).__name__}", REMEDY)
    tensors, foreign = {}, []
    for name, value in values.items():
        try:
            if not isinstance(name, str):
                raise UnfitError("not a name")
            tensors[name] = _lazy(path, value, records)
        except UnfitError as error:
            label = f"{name:.100}" if isinstance(name, str) else type(name).__name__
            foreign.append(f"{label}: {error}")
    raise_listed(f"{path} holds entries that are not weights", foreign, REMEDY)
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def small_pickle(path: Path) -> Any:
    """The object in a small pickle, such as a table of scales. Raises CheckpointError as above."""
    if path.stat().st_size > LARGEST_PICKLE:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for a table of scales", REMEDY)
    return _load(path, device="cpu")[0]


def _load(path: Path, device: str = "meta") -> tuple[Any, dict[int, int] | None]:
    """The object, its tensors on the meta device, and the file's records: first byte -> length.

    None for the records says that the file is of the old format and its tensors are in memory.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                _look_at(io.BytesIO(file.read(LARGEST_PICKLE)), OLD_FORMAT_PICKLES, path.stat().st_size)
                return torch.load(path, map_location="cpu", weights_only=True), None
            records = _records(file)
        return torch.load(path, map_location=device, weights_only=True), records
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason:  # torch goes on to recommend the loader that runs code
            reason = "it holds something other than tensors"
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {reason:.300}", REMEDY
        ) from error


def _records(file: IO[bytes]) -> dict[int, int]:
    """First byte -> length of each record of the archive, after a look at the pickle in it."""
    result = {}
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if len({info.filename for info in infos}) != len(infos):
            raise UnfitError("the archive names a record twice")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise UnfitError(f"{info.filename} is compressed, torch never does that")
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            result[start + int.from_bytes(lengths[2:], "little")] = info.file_size
        for info in infos:
            name = info.filename.split("/", 1)[-1]
            if name in ("data.pkl", "byteorder", ".format_version", ".storage_alignment", "version"):
                content = _small_record(archive, info)
                if name == "data.pkl":
                    _look_at(io.BytesIO(content), 1, file.seek(0, io.SEEK_END))
                if name == "byteorder" and content != b"little":
                    raise UnfitError(f"its byte order is {content!r:.20}")
    return result


def _small_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > LARGEST_PICKLE:
        raise UnfitError(f"{info.filename} has {info.file_size} bytes, at most {LARGEST_PICKLE} are read")
    return archive.read(info)


def _look_at(stream: IO[bytes], pickles: int, file_size: int) -> None:
    """Raises UnfitError if a pickle names anything but tensors and containers, counts more than the file can
    hold, or is built to take for ever. Nothing is executed."""
    for number in range(pickles):
        tuples: set[Any] = set()
        shared, last = 0, ""
        for opcode, argument, _ in pickletools.genops(stream):
            code = opcode.name
            if code == "GLOBAL" and not HARMLESS.fullmatch(str(argument)):
                raise UnfitError(f"it asks for {str(argument).replace(' ', '.'):.200}, which is not a tensor")
            if code in FOREIGN_OPCODES:
                raise UnfitError(f"it uses the opcode {code}")
            if number == OLD_FORMAT_OBJECT and code.startswith(INTEGERS) and int(argument or 0) > file_size:
                raise UnfitError(f"it counts {argument}, and the file has {file_size} bytes")
            if "PUT" in code and "TUPLE" in last:
                tuples.add(argument)
            shared += "GET" in code and argument in tuples
            if shared > MOST_SHARED_TUPLES:
                raise UnfitError("its tuples contain each other")
            last = code


def _lazy(path: Path, value: Any, records: dict[int, int] | None) -> LazyTensor:
    """A loaded tensor as one to be read. Raises UnfitError if it is none, or not what the file holds."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise UnfitError(type(value).__name__)
    tensor = value.detach()
    shape = tuple(tensor.shape)
    if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise UnfitError("a view with an operation still to be done")
    storage = tensor.untyped_storage()
    if tensor.numel() * tensor.itemsize > storage.nbytes():
        raise UnfitError(f"{list(shape)} of {storage.nbytes()} bytes")
    if records is None:
        return LazyTensor(shape, tensor.dtype, tensor.contiguous)
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None or records.get(start) != storage.nbytes():
        raise UnfitError(f"needs {storage.nbytes()} bytes, the file has {records.get(start or 0, 0)} for it")
    return LazyTensor(shape, tensor.dtype, partial(_read, path, start, tensor))


def _read(path: Path, start: int, tensor: Tensor) -> Tensor:
    """A tensor on the meta device, from its storage that starts at byte `start` of the file."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (steps + 1) * tensor.itemsize if tensor.numel() else 0
    buffer = torch.empty(needed, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(start + int(tensor.storage_offset()) * tensor.itemsize)
        done = file.readinto(buffer.numpy().data) if needed else 0
    if done != needed:
        raise CheckpointError(f"{path} ends {needed - done} bytes before the end of a tensor", REMEDY)
    return buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).contiguous()
