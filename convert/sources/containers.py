"""Files of tensors, whatever model they belong to: safetensors, single or in shards, and torch pickles.

Invariants: tensors come back lazily and under the names in the file; a pickle may hold tensors and plain
containers only, and nothing in it is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, open_safetensors

WRAPPERS = ("module", "ema", "state_dict", "model")
DOWNLOAD = "Download or copy it again."


def safetensors_tensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of one safetensors file. Raises CheckpointError if it is damaged or truncated."""
    file = open_safetensors(path)
    tensors = {}
    for name, entry in file.entries.items():
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry.dtype}, which torch cannot hold")
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        tensors[name] = LazyTensor(entry.shape, dtype, partial(file.read, name))
    return tensors


def shards(index: Path) -> tuple[Path, ...]:
    """The files that a Hugging Face `*.index.json` names, in the order of their names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(value) for value in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map", DOWNLOAD)
    return tuple(index.parent / name for name in sorted(set(weight_map.values())))


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def sharded_tensors(index: Path) -> dict[str, LazyTensor]:
    """All tensors of a sharded checkpoint. Raises CheckpointError if a shard lacks what the index
    promises."""
    tensors: dict[str, LazyTensor] = {}
    for shard in shards(index):
        tensors |= file_tensors(shard)
    lacking = [name for name in read_json(index)["weight_map"] if name not in tensors]
    raise_listed(f"the shards of {index} lack tensors", [f"missing: {name}" for name in lacking], DOWNLOAD)
    return tensors


def file_tensors(path: Path) -> dict[str, LazyTensor]:
    """By suffix: an index of shards, safetensors, or a pickle."""
    if path.name.endswith(".index.json"):
        return sharded_tensors(path)
    return safetensors_tensors(path) if path.suffix == ".safetensors" else pickle_tensors(path)


def pickle_tensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a torch pickle, mapped from the file: memory is used only for what is being read.

    Unwraps `{"module": ...}` and its like, and the `module.` prefix of a parallel-training wrapper.
    Raises CheckpointError for a file that is truncated, damaged, or holds anything but weights.
    """
    values = _unpickle(path)
    while isinstance(values, Mapping) and (key := next((key for key in WRAPPERS if key in values), None)):
        if not isinstance(values[key], Mapping):
            break
        values = values[key]
    if not isinstance(values, Mapping) or not values:
        raise CheckpointError(f"{path} holds no tensors, but a {type(values).__name__}", DOWNLOAD)
    foreign = [
        f"{name!r:.100}: {type(value).__name__}"
        for name, value in values.items()
        if not (isinstance(name, str) and _is_plain(value))
    ]
    raise_listed(f"{path} holds entries that are not weights", foreign, DOWNLOAD)
    prefix = "module." if all(name.startswith("module.") for name in values) else ""
    return {
        name.removeprefix(prefix): LazyTensor(tuple(value.shape), value.dtype, value.detach().contiguous)
        for name, value in values.items()
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        # files from before torch 1.6 are no zip archives and cannot be mapped: they are read whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        refused = next((line for line in reason if "Unsupported" in line or "GLOBAL" in line), reason[0])
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {refused:.300}",
            "It is truncated, damaged, or holds code, which is never run. " + DOWNLOAD,
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})", DOWNLOAD) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is JSON, but not an object", DOWNLOAD)
    return values
