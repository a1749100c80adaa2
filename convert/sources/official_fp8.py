"""The released fp8 pickle: codes in the `.pt`, scales in a second file `*_map.pt` beside it.

Without that file the codes mean nothing (the model gives noise, not an error), so it is demanded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import DOWNLOAD, PICKLE, Container
from lowvram_i2v.convert.sources.pickles import small_pickle
from lowvram_i2v.convert.sources.quantization import Decoded
from lowvram_i2v.convert.sources.scaled import scaled
from lowvram_i2v.errors import CheckpointError

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


def label(container: Container) -> str | None:
    coded = any(tensor.dtype in CODES for tensor in container.tensors.values())
    return "released fp8 with a map of scales" if container.kind == PICKLE and coded else None


def decode(container: Container) -> Decoded:
    """Raises CheckpointError if the map is missing or lacks a scale."""
    path = container.path.with_name(container.path.stem + "_map.pt")
    if not path.is_file():
        raise CheckpointError(
            f"{container.path} has fp8 weights, and {path.name}, which holds their scales, is not beside it",
            f"Download {path.name} too.",
        )
    scales = small_pickle(path)
    if not isinstance(scales, Mapping):
        raise CheckpointError(f"{path} is no table of scales, but a {type(scales).__name__}", DOWNLOAD)
    result, faults = {}, []
    for name, tensor in container.tensors.items():
        if tensor.dtype not in CODES:
            result[name] = tensor
            continue
        scale = _scale(scales.get(name.removesuffix(".weight")))
        if scale is None:
            faults.append(f"no scale for {name}")
        else:
            result[name] = scaled(name, tensor, scale)
    raise_listed(f"{path} does not belong to {container.path.name}", faults, DOWNLOAD)
    return Decoded(result, label(container) or "")


def _scale(value: object) -> LazyTensor | None:
    """A number or a tensor of one value."""
    tensor = torch.tensor(value) if isinstance(value, float) else value
    if not isinstance(tensor, Tensor) or tensor.numel() != 1:
        return None
    return LazyTensor((), tensor.dtype, lambda: tensor.detach().reshape(()))
