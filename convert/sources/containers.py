"""Files of tensors, whatever model they belong to: safetensors, single or in shards, torch pickles, GGUF.

Invariants: what a file is, its first bytes say; tensors come back lazily and under the names in the file; opening
reads headers only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, open_safetensors

DOWNLOAD = "Download or copy it again."
ACCESS = "Are you allowed to read it, and is its disk there?"
LARGEST_JSON = 32 * 2**20  # bytes; indexes and configs have less than 1 MiB, tokenizers 17
LONGEST_NAME = 200  # characters of a file's name
DTYPE_LABELS = {getattr(torch, ours): theirs for theirs, ours in TORCH_DTYPES.items()}
SAFETENSORS, PICKLE, GGUF = "safetensors", "torch pickle", "GGUF"
SUFFIXES = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Container:
    """One file, or the shards of one index, opened.

    path: what was asked for; files: all that is read; kind: one of the three above.
    tensors: under the names in the file. labels: name -> the stored dtype as the format calls it ("F8_E4M3", "Q4_K").
    metadata: what the header says beside the tensors; values are strings but for GGUF.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype, the most frequent first."""
        return dict(Counter(self.labels[name] for name in self.tensors).most_common())


def stripped(container: Container, prefix: str) -> tuple[Container, tuple[str, ...]]:
    """The tensors whose names start with `prefix`, without it; and the names of the others."""
    inside = {name: name.removeprefix(prefix) for name in container.tensors if name.startswith(prefix)}
    tensors = {bare: container.tensors[name] for name, bare in inside.items()}
    labels = {bare: container.labels[name] for name, bare in inside.items()}
    outside = tuple(name for name in container.tensors if name not in inside)
    return replace(container, tensors=tensors, labels=labels), outside


def open_container(path: Path) -> Container:
    """Opens a file of tensors. Raises CheckpointError if it is none, or damaged, truncated, unreadable, or holds
    code."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file", "Give a file of weights.")
        return _open_shards(path) if path.name.endswith(".json") else _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", ACCESS) from error


def _open_file(path: Path) -> Container:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":
        from lowvram_i2v.convert.sources.gguf_file import open_gguf

        tensors, labels, metadata = open_gguf(path)
        return Container(path, (path,), GGUF, tensors, metadata, labels)
    if start[8:9] == b"{" or path.suffix in (".safetensors", ".sft"):
        return _open_safetensors(path)
    from lowvram_i2v.convert.sources.pickles import pickle_tensors

    tensors = pickle_tensors(path)
    labels = {name: DTYPE_LABELS.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    return Container(path, (path,), PICKLE, tensors, {}, labels)


def _open_safetensors(path: Path) -> Container:
    file = open_safetensors(path)
    tensors = {}
    for name, entry in file.entries.items():
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry.dtype}, which torch cannot hold")
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        tensors[name] = LazyTensor(entry.shape, dtype, partial(file.read, name))
    labels = {name: entry.dtype for name, entry in file.entries.items()}
    return Container(path, (path,), SAFETENSORS, tensors, dict(file.metadata), labels)


def _open_shards(index: Path) -> Container:
    """The files that an index names, as one. Raises CheckpointError if a shard, or a tensor of it, is not there."""
    files = shards(index)
    missing = [f"missing: {path.name}" for path in files if not path.is_file()]
    raise_listed(f"{index} names files that are not beside it", missing, DOWNLOAD)
    parts = [open_container(path) for path in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    lacking = [f"missing: {name}" for name in read_json(index)["weight_map"] if name not in tensors]
    raise_listed(f"the shards of {index} lack tensors", lacking, DOWNLOAD)
    return Container(
        index,
        files,
        parts[0].kind,
        tensors,
        {key: value for part in parts for key, value in part.metadata.items()},
        {name: label for part in parts for name, label in part.labels.items()},
    )


def shards(index: Path) -> tuple[Path, ...]:
    """The files that a Hugging Face `*.index.json` names, in the order of their names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{index} has no usable weight_map", DOWNLOAD)
    return tuple(index.parent / name for name in sorted(set(weight_map.values())))


def _is_file_name(value: Any) -> bool:
    """A shard lies beside its index, and is none itself."""
    if not isinstance(value, str) or not value or not value.isprintable():
        return False
    return Path(value).name == value and len(value) <= LONGEST_NAME and not value.endswith(".json")


def file_tensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a file or of an index of shards."""
    return open_container(path).tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes, too many for a JSON file of a model", DOWNLOAD)
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})", DOWNLOAD) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", DOWNLOAD) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is JSON, but not an object", DOWNLOAD)
    return values


def only_weights(folder: Path) -> Path:
    """The one index or file of weights in a folder. Raises CheckpointError if there is none, or a choice."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}", ACCESS) from error
    indexes = [name for name in names if name.endswith(".index.json")]
    files = [name for name in names if name.endswith(SUFFIXES) and not name.endswith("_map.pt")]
    found = indexes or files
    if len(found) == 1:
        return folder / found[0]
    what = "holds no weights" if not found else f"holds several sets of weights: {', '.join(found[:10])}"
    raise CheckpointError(f"{folder} {what}", "Give the file itself, or for shards the .index.json.")


def renamed(
    tensors: Mapping[str, LazyTensor], rename: Callable[[str], str | None], path: Path, remedy: str = DOWNLOAD
) -> dict[str, LazyTensor]:
    """The tensors that are stored, under our names. Raises CheckpointError listing all names of another
    model."""
    result, foreign = {}, []
    for name, tensor in tensors.items():
        try:
            ours = rename(name)
        except CheckpointError:
            foreign.append(f"unexpected: {name}")
            continue
        if ours is not None:
            result[ours] = tensor
    raise_listed(f"{path} holds tensors of another model", foreign, remedy)
    return result
