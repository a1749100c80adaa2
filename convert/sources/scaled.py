"""Weights as 8-bit codes beside a scale: value = code * scale. Four programs' spellings of it.

    scaled_fp8, <layer>.scale_weight   ComfyUI before 0.4 ("fp8 scaled"), scalar
    <layer>.scale_weight               musubi-tuner: scalar, rows, or blocks of a row; no marker
    <layer>.weight_scale               LightX2V: rows, int8 or fp8
    fp8_scale, <layer>.fp8_scale       Kijai's wrapper, scalar

A scale's meaning is its shape: [] or [1] all of the weight; [out] or [out, 1] a row; [out, n, 1] n equal blocks of
a row. Where that is one of this project's own schemes the codes can be kept (`LazyTensor.parts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import DOWNLOAD, Container
from lowvram_i2v.convert.sources.quantization import Decoded
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.kernels.chunks import row_chunks

FILE_MARKER = "scaled_fp8"
MARKERS = (FILE_MARKER, "fp8_scale")  # of no layer: they say that the file has scales
SCALES = ("scale_weight", "weight_scale", "fp8_scale")
UNUSED = ("scale_input", "input_scale", "output_scale", "comfy_quant")  # of activations, or seen already
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def label(container: Container) -> str | None:
    suffixes = {name.rpartition(".")[2] for name in container.tensors}
    kind = "int8" if "I8" in container.dtypes else "fp8"
    if "scale_weight" in suffixes:
        return "ComfyUI fp8 scaled (before 0.4)" if FILE_MARKER in container.tensors else f"musubi-tuner {kind} scaled"
    if "weight_scale" in suffixes:
        return f"LightX2V {kind}"
    return "Kijai fp8 with scales" if "fp8_scale" in suffixes else None


def decode(container: Container) -> Decoded:
    return Decoded(scaled_tensors(container), label(container) or "")


def scaled_tensors(container: Container) -> dict[str, LazyTensor]:
    """The tensors, each with its scale applied. Raises CheckpointError listing codes without a scale and scales
    without codes."""
    tensors, result, faults = container.tensors, {}, []
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if name in MARKERS or suffix in UNUSED:
            continue
        if suffix in SCALES:
            faults += [] if f"{layer}.weight" in tensors else [f"{name} belongs to no weight"]
            continue
        scale = next((tensors[f"{layer}.{s}"] for s in SCALES if f"{layer}.{s}" in tensors), None)
        if suffix == "weight" and scale is not None:
            result[name] = scaled(name, tensor, scale)
        elif tensor.dtype in CODES:
            faults.append(f"{name} is {container.labels[name]} and has no scale")
        else:
            result[name] = tensor
    raise_listed(f"{container.path} has codes and scales that do not belong together", faults, DOWNLOAD)
    return result


def scaled(name: str, codes: LazyTensor, scale: LazyTensor, factor: float = 1.0) -> LazyTensor:
    """codes * scale * factor as float32. Raises CheckpointError if the scale's shape fits no rule."""
    blocks = _blocks(codes.shape, scale.shape)
    if blocks is None or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{name} is {list(codes.shape)}, its scale {list(scale.shape)} of {scale.dtype}: no known way to scale",
            "Use a file with one scale for each weight, row, or block of a row.",
        )
    rows, per_row = blocks

    def read() -> Tensor:
        stored, scales = codes.read(), finite_scale(name, scale) * factor
        values = torch.empty(stored.shape)
        wide = scales.reshape(rows, per_row, 1)
        for part in row_chunks(stored.shape[0] if stored.dim() else 1, math.prod(stored.shape[1:])):
            piece = stored[part].float().reshape(-1, per_row, math.prod(stored.shape[1:]) // per_row)
            values[part] = (piece * (wide[part] if rows > 1 else wide)).reshape(values[part].shape)
        return values

    parts, scheme = _kept(name, codes, scale, blocks) if factor == 1.0 else (None, None)
    return LazyTensor(codes.shape, torch.float32, read, parts, scheme)


def _blocks(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows with a scale of their own or 1, blocks in a row); None if the shapes fit no rule."""
    if not weight or 0 in weight:
        return None
    if scale in ((), (1,), (1, 1)):
        return 1, 1
    if scale in (weight[:1], (weight[0], 1)):
        return weight[0], 1
    if len(scale) == 3 and len(weight) == 2 and scale[::2] == (weight[0], 1) and scale[1] > 0:
        return (weight[0], scale[1]) if weight[1] % scale[1] == 0 else None
    return None


def finite_scale(name: str, scale: LazyTensor) -> Tensor:
    """The scale as float32. Raises CheckpointError if a value is not finite."""
    values = scale.read().float()
    if not values.isfinite().all():
        raise CheckpointError(f"the scale of {name} has values that are not finite", DOWNLOAD)
    return values


def _kept(
    name: str, codes: LazyTensor, scale: LazyTensor, blocks: tuple[int, int]
) -> tuple[Mapping[str, LazyTensor] | None, str | None]:
    """The codes as parts of our own scheme, where they are just that (one scale for all rows is one for each)."""
    rows, per_row = blocks
    if len(codes.shape) != 2 or per_row != 1:
        return None, None
    if codes.dtype == torch.float8_e4m3fn and rows == 1:
        whole = LazyTensor((), torch.float32, lambda: finite_scale(name, scale).reshape(()))
        return {"weight": codes, "scale_weight": whole}, "fp8"
    if codes.dtype == torch.int8:
        shape = (codes.shape[0], 1)
        each = LazyTensor(shape, torch.float32, lambda: finite_scale(name, scale).reshape(-1, 1).expand(shape).clone())
        return {"weight": codes, "weight_scale": each}, "int8"
    return None, None
