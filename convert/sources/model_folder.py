"""A model folder as a source: to store it by another scheme, or to export it.

Its own quantized tensors are dequantized on reading, or copied where the scheme stays the same.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import TOKENIZERS, component_file, raise_listed, read_records
from lowvram_i2v.convert.shapes import Shapes, llava_shapes, transformer_shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints, LazyTensor
from lowvram_i2v.convert.sources.tokenizer_files import require_small
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.kernels.scheme import QuantScheme, is_marker, scheme_of_dtype
from lowvram_i2v.safetensors_file import TORCH_DTYPES, SafetensorsFile, open_safetensors

EXPECTED = "Or give a model folder that convert has written."


def matches(folder: Path) -> bool:
    return (folder / "model.json").is_file()


def open_components(folder: Path, components: tuple[str, ...], hints: Hints) -> dict[str, ComponentSource]:
    """Raises CheckpointError, listing all components that the folder has not."""
    records = read_records(folder)
    missing = [
        f"missing: {component}"
        for component in components
        if component not in records.components or not (folder / component_file(component)).is_file()
    ]
    raise_listed(f"{folder} is not complete", missing, "Convert these first, or leave them out (--component).")
    found = {}
    for component in components:
        path = folder / component_file(component)
        tokenizer = folder / TOKENIZERS.get(component, "")
        found_files = tokenizer.iterdir() if component in TOKENIZERS and tokenizer.is_dir() else ()
        files = sorted(file for file in found_files if file.is_file())
        require_small(files)
        found[component] = ComponentSource(
            path,
            path.stat().st_size,
            dequantized(component, open_safetensors(path), records.components[component].config),
            records.components[component].config,
            tuple(files),
            variant=records.variant if component == "transformer" else None,
        )
    return found


def dequantized(component: str, file: SafetensorsFile, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """The tensors of a component's file with their true values; float32 where the file has a quantized one.

    config: as `model.json` records it; a 4-bit weight's shape is found there only.
    """
    unread = [
        f"stored as {entry.dtype}: {name}" for name, entry in file.entries.items() if entry.dtype not in TORCH_DTYPES
    ]
    raise_listed(f"{file.path} has tensors that torch cannot hold", unread, "Convert again.")
    stored = {
        name: LazyTensor(entry.shape, getattr(torch, TORCH_DTYPES[entry.dtype]), partial(file.read, name))
        for name, entry in file.entries.items()
        if not is_marker(name)
    }
    schemes = {
        name.removesuffix(".weight"): scheme
        for name, tensor in stored.items()
        if name.endswith(".weight") and (scheme := scheme_of_dtype(tensor.dtype)) is not None
    }
    shapes = _shapes(component, config) if schemes else {}
    parts = {f"{layer}.{suffix}" for layer, scheme in schemes.items() for suffix in scheme.parts(1, 1)}
    result = {}
    for name, tensor in stored.items():
        layer = name.removesuffix(".weight")
        if name not in parts:
            result[name] = tensor
        elif layer != name:
            result[name] = _weight(file, layer, schemes[layer], shapes.get(name, ()), stored)
    return result


def _shapes(component: str, config: dict[str, Any]) -> Shapes:
    try:
        known = transformer_shapes(TransformerConfig.from_dict(config)) if component == "transformer" else None
        return llava_shapes(config) if known is None else known
    except TypeError as error:
        raise CheckpointError(f"model.json has a config with other keys ({error})", "Convert again.") from error


def _weight(
    file: SafetensorsFile, layer: str, scheme: QuantScheme, shape: tuple[int, ...], stored: dict[str, LazyTensor]
) -> LazyTensor:
    """A quantized weight, with its parts for those who want them as they are."""
    rows, columns = shape if len(shape) == 2 else (0, 0)
    wanted = scheme.parts(rows, columns)
    parts = {suffix: stored[f"{layer}.{suffix}"] for suffix in wanted if f"{layer}.{suffix}" in stored}
    if {suffix: (part.shape, part.dtype) for suffix, part in parts.items()} != wanted:
        raise CheckpointError(f"{file.path}: {layer} is not whole, as {scheme.name} of {list(shape)}", "Convert again.")

    def read() -> Tensor:
        return scheme.dequantize(
            {suffix: part.read() for suffix, part in parts.items()}, torch.float32, (rows, columns)
        )

    return LazyTensor((rows, columns), torch.float32, read, parts, scheme.name)
