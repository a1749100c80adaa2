"""How the values of a file are coded, and what they are: every quantization becomes plain lazily read tensors.

Each reader is one file with `label(container) -> str | None` (its name for a user, None if the file is coded
otherwise; headers only) and `decode(container) -> Decoded`. The first of READERS that knows the file decodes it.

Invariants: values are computed in float32 and handed on as float32, so nothing is rounded twice; memory is one
tensor, as stored and as float32; scales that are not finite, or fit no rule, are an error. Names do not matter here:
a layer's tensors belong together by what stands before their last part.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import Container

UNQUANTIZED = "none"
READERS = tuple(
    f"lowvram_i2v.convert.sources.{name}"
    for name in ("gguf_types", "quanto", "bitsandbytes", "comfy_quant", "scaled", "official_fp8", "plain_fp8")
)


@dataclass(frozen=True)
class Decoded:
    """tensors: plain ones, under the names in the file without those of scales and markers.

    label: the quantization's name. notices: sentences that the user should read.
    """

    tensors: dict[str, LazyTensor]
    label: str = UNQUANTIZED
    notices: tuple[str, ...] = ()


def quantization(container: Container) -> str:
    """What the quantization is called, "none" if there is none."""
    labels = (import_module(reader).label(container) for reader in READERS)
    return next((label for label in labels if label is not None), UNQUANTIZED)


def decode(container: Container) -> Decoded:
    """The file's tensors with their true values.

    Raises CheckpointError where a scale is missing, misshapen or of an unknown kind, PlatformError where a
    package is missing.
    """
    for reader in map(import_module, READERS):
        if reader.label(container) is not None:
            decoded: Decoded = reader.decode(container)
            return decoded
    return Decoded(container.tensors)
