"""The transformer as optimum-quanto stores it (qint8), in the one file that Wan2GP and HunyuanVideoGP read.

    <layer>.weight._data     I8    [out, in]
    <layer>.weight._scale    BF16  [out, 1]     weight = _data * _scale
    <layer>.input_scale, .output_scale          BF16, 1: activations are not quantized
    metadata                 quantization_format, quantization_map_base64, config_base64

The integers are those nearest to weight / scale for the scale as stored, rounded to bfloat16, so that rounding the
scale costs nothing but a little range. Layers are those of `policy`; all else is bfloat16.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.convert.export import OutputFile
from lowvram_i2v.convert.origin import Component
from lowvram_i2v.convert.policy import Job, Layout, StoredTensor, cast, layout, quantizable
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.kernels.chunks import SMALLEST, absmax, row_chunks

COMPONENTS = ("transformer",)
FILES = {
    "token_replace": "hunyuan_video_i2v_720_quanto_int8v2.safetensors",
    "latent_concat": "hunyuan_video_i2v_720_quanto_int8.safetensors",
}
LARGEST = 127


def plan(component: Component) -> list[OutputFile]:
    tensors = component.source.tensors
    layers = quantizable(component.name, component.shapes)
    plain = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers}
    rest = layout(component.name, "bf16", plain)
    quantized = [_quantized(layer, tensors[f"{layer}.weight"]) for layer in layers]
    constants = [one for layer in layers for one in _scales(layer)]
    made = Layout(
        (*rest.tensors, *(tensor for _, parts in quantized for tensor in parts), *(tensor for _, tensor in constants)),
        (*rest.jobs, *(job for job, _ in quantized), *(job for job, _ in constants)),
    )
    config = official_config(TransformerConfig.from_dict(component.config), component.variant)
    metadata = {
        "format": "pt",
        "quantization_format": "quanto",
        "quantization_map_base64": _base64({layer: {"weights": "qint8", "activations": "none"} for layer in layers}),
        "config_base64": _base64(config),
    }
    return [OutputFile(FILES[component.variant or "token_replace"], made, metadata)]


def _quantized(layer: str, weight: LazyTensor) -> tuple[Job, list[StoredTensor]]:
    data, scale = f"{layer}.weight._data", f"{layer}.weight._scale"

    def make(values: Tensor) -> dict[str, Tensor]:
        codes, scales = quantize(values, f"{layer}.weight")
        return {data: codes, scale: scales}

    stored = [
        StoredTensor(data, weight.shape, torch.int8),
        StoredTensor(scale, (weight.shape[0], 1), torch.bfloat16),
    ]
    return Job((data, scale), weight, make), stored


def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> codes int8 [out, in], scales bfloat16 [out, 1]."""
    scale = (absmax(weight, name, dim=1) / LARGEST).clamp_min_(SMALLEST).to(torch.bfloat16)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(*weight.shape):
        codes[rows] = (weight[rows].float() / scale[rows].float()).round_().clamp_(-LARGEST, LARGEST)
    return codes, scale


def _scales(layer: str) -> Iterator[tuple[Job, StoredTensor]]:
    for suffix in ("input_scale", "output_scale"):
        name, one = f"{layer}.{suffix}", torch.ones((), dtype=torch.bfloat16)
        lazy = LazyTensor((), torch.bfloat16, lambda one=one: one)  # type: ignore[misc]
        yield (
            Job((name,), lazy, lambda values, name=name: {name: cast(name, values, torch.bfloat16)}),  # type: ignore[misc]
            StoredTensor(name, (), torch.bfloat16),
        )


def official_config(config: TransformerConfig, variant: str | None) -> dict[str, Any]:
    """The sizes under the names that the released model's class gives them."""
    return {
        "patch_size": list(config.patch_size),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "hidden_size": config.hidden_size,
        "heads_num": config.heads,
        "mlp_width_ratio": config.mlp_ratio,
        "mlp_act_type": "gelu_tanh",
        "mm_double_blocks_depth": config.double_blocks,
        "mm_single_blocks_depth": config.single_blocks,
        "rope_dim_list": list(config.rope_dims),
        "qkv_bias": True,
        "qk_norm": True,
        "qk_norm_type": "rms",
        "guidance_embed": config.guidance_embed,
        "text_projection": "single_refiner",
        "use_attention_mask": True,
        "i2v_condition_type": variant,
    }


def _base64(values: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(values).encode()).decode()
