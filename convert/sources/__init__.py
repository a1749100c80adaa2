"""What `convert` reads: layouts of downloaded weights, each seen as lazily read tensors under our names.

Two things vary, each on its own: how tensors are named (convert/names.py) and how their values are coded
(sources/quantization.py). A file of either kind is a Container (sources/containers.py).

Invariants: opening a source reads headers and small JSON files, never a weight; everything that is missing is
reported at once; a pickle is only ever opened by torch's weights-only loader.

To add a layout of folders, write `sources/<name>.py` with `matches`, `open_components` and EXPECTED and add a
line to SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram_i2v.errors import CheckpointError

SOURCES = {
    "a model folder": "lowvram_i2v.convert.sources.model_folder",
    "a diffusers repository": "lowvram_i2v.convert.sources.diffusers_folder",
    "the released tree": "lowvram_i2v.convert.sources.official",
    "ComfyUI's models folder": "lowvram_i2v.convert.sources.comfy_set",
}
"""The first that matches a folder reads it. diffusers' comes before the released tree: both have `text_encoder_2/`, and
what diffusers' asks for no released tree has."""
COMPONENT_READERS = {  # each has `open_component(path, hints)`
    "transformer": "lowvram_i2v.convert.sources.transformer",
    "text_encoder": "lowvram_i2v.convert.sources.text_encoder",
    "text_encoder_2": "lowvram_i2v.convert.sources.clip",
    "vae": "lowvram_i2v.convert.sources.vae",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of which only shape and dtype are known until `read` is called; it then is the caller's to
    drop.

    Renaming, casting, slicing, joining and quantizing all are new LazyTensors around old ones.

    parts, scheme: set where the source's quantization is exactly one of ours (a row of `kernels.scheme.SCHEMES`).
    The parts, by the scheme's suffixes, may then be copied bit for bit; `read` gives the dequantized values
    all the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: Mapping[str, LazyTensor] | None = None
    scheme: str | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Hints:
    """What the user says about a piece whose files leave it open.

    variant: of the transformer, None if not said. config, tokenizer: a config.json and a folder of tokenizer
    files for a text encoder that comes without.
    """

    variant: str | None = None
    config: Path | None = None
    tokenizer: Path | None = None


class SmallFile(Protocol):
    """A file of a few megabytes at most, written into the model folder as it is. A `Path` is one; others lie inside
    another file, or are made from it."""

    @property
    def name(self) -> str: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class ComponentSource:
    """One component as downloaded.

    path: the file or folder it comes from; bytes: how much is read.
    tensors: under the names of the model folder's files.
    config: the released config.json; empty for a transformer, whose sizes are read from its tensors.
    tokenizer: files to write beside it.
    notices: sentences that the user should read. variant: a transformer's, None where the user must say it.
    """

    path: Path
    bytes: int
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    tokenizer: tuple[SmallFile, ...] = ()
    notices: tuple[str, ...] = ()
    variant: str | None = None

    def with_notices(self, *more: str) -> ComponentSource:
        return replace(self, notices=(*self.notices, *more))


def open_component(path: Path, component: str, hints: Hints | None = None) -> ComponentSource:
    """Opens one component from a file, an index of shards, or a folder.

    Raises CheckpointError for what is damaged, incomplete, or another model, and says what it is.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "Give the file or folder that holds the weights.")
    opened: ComponentSource = import_module(COMPONENT_READERS[component]).open_component(path, hints or Hints())
    return opened


def open_source(folder: Path, components: Iterable[str], hints: Hints | None = None) -> dict[str, ComponentSource]:
    """Finds the layout of `folder` and opens the components asked for.

    Raises CheckpointError if the layout is none of SOURCES, or listing everything that is missing from it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "Give the folder that holds the downloaded weights.")
    expected = []
    for module_name in SOURCES.values():
        layout = import_module(module_name)
        if layout.matches(folder):
            opened: dict[str, ComponentSource] = layout.open_components(folder, tuple(components), hints or Hints())
            return opened
        expected.append(layout.EXPECTED)
    raise CheckpointError(f"{folder} holds no weights in a layout that convert reads", "\n  ".join(expected))
