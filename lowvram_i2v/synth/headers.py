"""A model folder's headers without a model: what `convert` would write for weights of a size, for planning.

Invariant: names, shapes, dtypes and order come from the same functions that `convert` uses, so a plan made from them is
the plan of the converted folder. Nothing is on disk: reading a tensor fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowvram_i2v.checkpoint import COMPONENTS, ComponentRecord, ModelFolder, ModelHeader, ModelRecords, component_file
from lowvram_i2v.convert.policy import component_scheme, layout
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, SafetensorsFile, TensorEntry
from lowvram_i2v.synth.sizes import SIZES, clip_json, llava_json, transformer_config
from lowvram_i2v.variant import Variant

IDS = {"begin": 128000, "end": 128001, "image": 128257, "pad": 128258}
STORED_AS = {getattr(torch, name): dtype for dtype, name in TORCH_DTYPES.items()}


def model_headers(size: str, variant: Variant, scheme: str) -> ModelFolder:
    """The headers of a folder that `convert --scheme` makes. size: a row of SIZES, "full" for the released model."""
    chosen = SIZES[size]
    transformer = transformer_config(chosen, variant)
    llava, clip = llava_json(chosen, IDS), clip_json(chosen)["text_config"]
    shapes: dict[str, Shapes] = {
        "transformer": transformer_shapes(transformer),
        "text_encoder": llava_shapes(llava),
        "text_encoder_2": clip_shapes(clip),
        "vae": vae_shapes(chosen.vae),
    }
    configs: dict[str, dict[str, Any]] = {
        "transformer": transformer.to_dict(),
        "text_encoder": llava,
        "text_encoder_2": clip,
        "vae": chosen.vae.to_dict(),
    }
    folder = Path(f"{size} {variant.name}")
    schemes = {component: component_scheme(component, scheme) for component in COMPONENTS}
    files = {component: _file(folder, component, shapes[component], schemes[component]) for component in COMPONENTS}
    records = {
        component: ComponentRecord(configs[component], schemes[component], 0, {"file": "planned", "bytes": 0})
        for component in COMPONENTS
    }
    return ModelFolder(folder, ModelHeader.from_records(ModelRecords(variant.name, records)), files)


def _file(folder: Path, component: str, shapes: Shapes, scheme: str) -> SafetensorsFile:
    tensors = {name: LazyTensor(shape, torch.bfloat16, _unreadable) for name, shape in shapes.items()}
    entries, end = {}, 0
    for tensor in layout(component, scheme, tensors).tensors:
        entries[tensor.name] = TensorEntry(STORED_AS[tensor.dtype], tensor.shape, end, tensor.bytes)
        end += tensor.bytes
    return SafetensorsFile(folder / component_file(component), entries, {})


def _unreadable() -> torch.Tensor:
    raise CheckpointError("these are headers for planning; there are no weights")
