"""What every reader of one component does first: find the weights at a path, and the config.json that goes with them.

Invariant: of several files that hold the same weights the first in WEIGHTS is taken, as Hugging Face's own loaders do;
otherwise nothing is chosen for the user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import Container, only_weights, open_container, read_json, renamed
from lowvram_i2v.errors import CheckpointError

WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.pt",
)


@dataclass(frozen=True)
class Match:
    """What the tensor names of a file say it is.

    layout: in words, for the user. refusal: why it is no use here (a relative of the model), None if it is.
    lacks: parts of the component that this layout keeps in another file.
    """

    component: str
    layout: str
    refusal: str | None = None
    lacks: tuple[str, ...] = ()


def open_weights(path: Path) -> Container:
    """The weights at a path: a file, an index of shards, or a folder with either."""
    if not path.is_dir():
        return open_container(path)
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    return open_container(found or only_weights(path))


def folder_of(path: Path) -> Path:
    """Where the small files of a component lie."""
    return path if path.is_dir() else path.parent


def config_beside(path: Path | None, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """The config.json in a folder, or beside a file, if its model_type is one of `kinds`; else empty.

    A folder of many models may have another's. No kinds: the caller looks for itself.
    """
    if path is None:
        return {}
    file = path if path.name.endswith("config.json") else folder_of(path) / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config if not kinds or config.get("model_type") in kinds else {}


def renamed_once(
    tensors: Mapping[str, LazyTensor], rename: Callable[[str], str | None], path: Path, remedy: str
) -> dict[str, LazyTensor]:
    """The tensors that are stored, under our names. Raises CheckpointError listing names of another model, or names
    that two tensors would have."""
    result = renamed(tensors, rename, path, remedy)
    ours = {name: rename(name) for name in tensors}
    counts = Counter(ours.values())
    twice = [f"twice: {new} ({name})" for name, new in ours.items() if new is not None and counts[new] > 1]
    raise_listed(f"{path} holds tensors more than once", twice, remedy)
    return result


def require_match(match: Match | None, path: Path, wanted: str, names: list[str], remedy: str) -> Match:
    """Raises CheckpointError, saying what the file is as far as that is known, if it is not what is wanted."""
    if match is None:
        shown = ", ".join(names[:3]) or "none"
        raise CheckpointError(f"{path} is not {wanted}: it has {len(names)} tensors ({shown}, ...)", remedy)
    if match.refusal is not None:
        raise CheckpointError(f"{path} is not {wanted}, but {match.refusal}", remedy)
    return match
