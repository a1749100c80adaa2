"""ComfyUI 0.4 and later: each quantized layer says in JSON how it is coded, in a tensor of its own or in the header.

    <layer>.comfy_quant                          U8, the bytes of {"format": "float8_e4m3fn", ...}
    __metadata__["_quantization_metadata"]       {"format_version": "1.0", "layers": {"<layer>": {...}}}
    <layer>.weight, <layer>.weight_scale         codes, scale

Read: fp8 and int8_tensorwise. Refused by name: the 4-bit and microscaling formats, and rotated ones.
"""

from __future__ import annotations

import json
from typing import Any

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import DOWNLOAD, Container
from lowvram_i2v.convert.sources.quantization import Decoded
from lowvram_i2v.convert.sources.scaled import scaled_tensors
from lowvram_i2v.errors import CheckpointError

SUFFIX, METADATA = ".comfy_quant", "_quantization_metadata"
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
HARMLESS_KEYS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "input_scale"}
LONGEST = 4096  # bytes of one layer's JSON


def label(container: Container) -> str | None:
    if METADATA not in container.metadata and not any(name.endswith(SUFFIX) for name in container.tensors):
        return None
    kinds = [
        kind for kind, stored in (("int8", "I8"), ("fp8", "F8_E4M3"), ("fp8", "F8_E5M2")) if stored in container.dtypes
    ]
    return f"ComfyUI {' and '.join(dict.fromkeys(kinds)) or 'quantized'} (0.4 and later)"


def decode(container: Container) -> Decoded:
    """Raises CheckpointError listing layers of formats that are not read."""
    faults = []
    for layer, config in _layers(container).items():
        expected = FORMATS.get(str(config.get("format")))
        stored = container.labels.get(f"{layer}.weight")
        changes = sorted(str(key) for key, value in config.items() if value and key not in HARMLESS_KEYS)
        if expected is None or changes:
            faults.append(
                f"{layer}: {config.get('format')!r:.60}{' with ' if changes else ''}{', '.join(changes):.100}"
            )
        elif stored is not None and stored != expected:
            faults.append(f"{layer}: says {config['format']}, but is stored as {stored}")
    raise_listed(
        f"{container.path} is quantized in ways that are not read",
        faults,
        "Read are float8_e4m3fn, float8_e5m2 and int8_tensorwise: use another file.",
    )
    return Decoded(scaled_tensors(container), label(container) or "")


def _layers(container: Container) -> dict[str, dict[str, Any]]:
    """layer -> what is said about it."""
    layers: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    if METADATA in container.metadata:
        layers = _object(container, container.metadata[METADATA]).get("layers", {})
    for name, tensor in container.tensors.items():
        if name.endswith(SUFFIX):
            layer = name.removesuffix(SUFFIX)
            inside[layer] = _object(container, small_text(container, name, tensor))
    if not isinstance(layers, dict) or not all(isinstance(config, dict) for config in layers.values()):
        raise CheckpointError(f"{container.path}: what it says about its quantization is damaged", DOWNLOAD)
    return layers | inside


def small_text(container: Container, name: str, tensor: LazyTensor) -> bytes:
    """The bytes of a tensor that holds text."""
    if tensor.bytes > LONGEST or container.labels[name] not in ("U8", "I8"):
        raise CheckpointError(f"{container.path}: {name} is no short text ({tensor.bytes} bytes)", DOWNLOAD)
    return tensor.read().numpy().tobytes()


def _object(container: Container, text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{container.path}: its quantization is not JSON ({error})", DOWNLOAD) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{container.path}: what it says about its quantization is damaged", DOWNLOAD)
    return values
