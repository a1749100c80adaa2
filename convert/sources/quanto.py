"""optimum-quanto, as HunyuanVideoGP and Wan2GP ship it.

    <layer>.weight._data    I8 [out, in] (or fp8)     <layer>.weight._scale   [out, 1]      value = _data * _scale
    <layer>.input_scale, <layer>.output_scale         of activations, not used

int8 rows are this project's own int8, so the codes can be kept.
"""

from __future__ import annotations

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import DOWNLOAD, Container
from lowvram_i2v.convert.sources.quantization import Decoded
from lowvram_i2v.convert.sources.scaled import CODES, scaled

DATA, SCALE = "._data", "._scale"
UNUSED = (".input_scale", ".output_scale")


def label(container: Container) -> str | None:
    if not any(name.endswith(DATA) for name in container.tensors):
        return None
    return "quanto int8" if "I8" in container.dtypes else "quanto"


def decode(container: Container) -> Decoded:
    """Raises CheckpointError listing layers without a scale, or packed below 8 bits."""
    tensors: dict[str, LazyTensor] = {}
    faults = []
    for name, tensor in container.tensors.items():
        plain = name.removesuffix(DATA)
        if name.endswith(SCALE) and name.removesuffix(SCALE) + DATA in container.tensors:
            continue
        if plain == name and not name.endswith(UNUSED):
            tensors[name] = tensor
        elif plain != name and plain + SCALE not in container.tensors:
            faults.append(f"{name} has no scale")
        elif plain != name and tensor.dtype not in CODES:
            faults.append(f"{name} is {container.labels[name]}; only 8-bit codes are read")
        elif plain != name:
            tensors[plain] = scaled(plain, tensor, container.tensors[plain + SCALE])
    raise_listed(f"{container.path} has quantized tensors that are not read", faults, DOWNLOAD)
    return Decoded(tensors, label(container) or "")
