"""Transformer and VAE as diffusers loads them: `transformer/` and `vae/`, each a config.json and safetensors files.

Layers that diffusers splits by rows are split, and the final modulation's halves swapped (convert/names.py). Files of
more than SHARD bytes are cut into shards with an index, as diffusers does it. Left out: text encoders, which are
Hugging Face folders of their own, and the pipeline's model_index.json.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.convert.export import OutputFile
from lowvram_i2v.convert.names import DIFFUSERS, SWAPPED, from_official, row_counts
from lowvram_i2v.convert.origin import Component
from lowvram_i2v.convert.policy import DTYPES, Job, Layout, StoredTensor, cast, layout
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.vae.config import VaeConfig

COMPONENTS = ("transformer", "vae")
SHARD = 10_000_000_000  # bytes
STEM = "diffusion_pytorch_model"


def plan(component: Component) -> list[OutputFile]:
    if component.name == "vae":
        made, config = layout("vae", "bf16", component.source.tensors), vae_config(component.config)
    else:
        sizes = TransformerConfig.from_dict(component.config)
        jobs = [_job(name, tensor, sizes.hidden_size) for name, tensor in component.source.tensors.items()]
        made = Layout(tuple(tensor for _, parts in jobs for tensor in parts), tuple(job for job, _ in jobs))
        config = transformer_config(sizes, component.variant)
    text = OutputFile(f"{component.name}/config.json", text=json.dumps(config, indent=2))
    return [text, *_sharded(component.name, made)]


def _job(name: str, tensor: LazyTensor, hidden: int) -> tuple[Job, list[StoredTensor]]:
    """An official tensor as one or several of diffusers'."""
    names, dtype = from_official(DIFFUSERS, name), DTYPES["bf16"]["transformer"]
    rows = row_counts(len(names), tensor.shape[0], hidden)
    stored = [StoredTensor(part, (count, *tensor.shape[1:]), dtype) for part, count in zip(names, rows, strict=True)]
    swapped = name.startswith(SWAPPED)

    def make(values: Tensor) -> dict[str, Tensor]:
        values = cast(name, values, dtype)
        values = values.roll(len(values) // 2, 0) if swapped else values
        return dict(zip(names, torch.split(values, rows), strict=True))

    return Job(names, tensor, make), stored


def _sharded(folder: str, made: Layout) -> list[OutputFile]:
    """One file, or shards and their index. What one job makes stays together."""
    tensors = {tensor.name: tensor for tensor in made.tensors}
    shards: list[list[Job]] = [[]]
    size = 0
    for job in made.jobs:
        more = sum(tensors[name].bytes for name in job.names)
        if shards[-1] and size + more > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += more
    layouts = [Layout(tuple(tensors[name] for job in jobs for name in job.names), tuple(jobs)) for jobs in shards]
    metadata = {"format": "pt"}
    if len(layouts) == 1:
        return [OutputFile(f"{folder}/{STEM}.safetensors", layouts[0], metadata)]
    names = [f"{STEM}-{n + 1:05d}-of-{len(layouts):05d}.safetensors" for n in range(len(layouts))]
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in made.tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, layouts, strict=True) for tensor in shard.tensors
        },
    }
    files = [OutputFile(f"{folder}/{name}", shard, metadata) for name, shard in zip(names, layouts, strict=True)]
    return [*files, OutputFile(f"{folder}/{STEM}.safetensors.index.json", text=json.dumps(index, indent=2))]


def transformer_config(config: TransformerConfig, variant: str | None) -> dict[str, Any]:
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "num_refiner_layers": config.refiner_blocks,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": config.guidance_embed,
        "text_embed_dim": config.text_dim,
        "pooled_projection_dim": config.pooled_dim,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_dims),
        "image_condition_type": variant,
    }


def vae_config(values: dict[str, Any]) -> dict[str, Any]:
    config = VaeConfig.from_dict(values)
    blocks = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * blocks,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * blocks,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "spatial_compression_ratio": config.spatial_ratio,
        "temporal_compression_ratio": config.time_ratio,
        "mid_block_add_attention": True,
    }
