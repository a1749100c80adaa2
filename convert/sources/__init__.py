"""What `convert` reads: layouts of downloaded weights, each seen as lazily read tensors under our names.

Invariants: opening a source reads headers and small JSON files, never a weight; everything that is missing is
reported at once; a pickle is only ever opened by torch's weights-only loader.

To add a layout, write `sources/<name>.py` with `matches` and `open_components` and add a line to SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.errors import CheckpointError

SOURCES = {
    "the released tree": "lowvram_i2v.convert.sources.official",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of which only shape and dtype are known until `read` is called; it then is the caller's to
    drop.

    Renaming, casting, slicing, joining and quantizing all are new LazyTensors around old ones.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ComponentSource:
    """One component as downloaded.

    path: the file or folder it comes from; bytes: how much is read.
    tensors: under the names of the model folder's files.
    config: the released config.json; empty for a transformer, whose sizes are read from its tensors.
    tokenizer: files to copy.
    """

    path: Path
    bytes: int
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    tokenizer: tuple[Path, ...] = ()


def open_source(folder: Path, components: Iterable[str]) -> dict[str, ComponentSource]:
    """Finds the layout of `folder` and opens the components asked for.

    Raises CheckpointError if the layout is none of SOURCES, or listing everything that is missing from it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "Give the folder that holds the downloaded weights.")
    expected = []
    for module_name in SOURCES.values():
        layout = import_module(module_name)
        if layout.matches(folder):
            opened: dict[str, ComponentSource] = layout.open_components(folder, tuple(components))
            return opened
        expected.append(layout.EXPECTED)
    raise CheckpointError(f"{folder} holds no weights in a layout that convert reads", "\n  ".join(expected))
