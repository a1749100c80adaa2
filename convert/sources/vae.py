"""The VAE, in the released names or in ComfyUI's.

    encoder.down_blocks.0.resnets.1.conv1.conv.weight    released .pt, diffusers, most single files
    encoder.down.0.block.1.conv1.conv.weight             Comfy-Org's; also all of its attention is 1x1x1 convolutions

Two files called hunyuan_video_vae_bf16.safetensors differ in this, so names decide. A file without a config.json has
the released one.

Invariant: every name has one counterpart; one that follows no rule keeps its name, and the comparison with the model
finds it. Left out: quantized VAEs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints, LazyTensor
from lowvram_i2v.convert.sources.component_files import (
    Match,
    config_beside,
    open_weights,
    renamed_once,
    require_match,
)
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.vae.config import BLOCKS, VaeConfig

PREFIXES = ("", "vae.", "first_stage_model.")
RELEASED_ANCHOR = "encoder.down_blocks.0.resnets.0.conv1.conv.weight"
COMFY_ANCHOR = "encoder.down.0.block.0.conv1.conv.weight"
LATENT = "post_quant_conv.weight"
REMEDY = "Give the VAE of HunyuanVideo: vae/pytorch_model.pt, or hunyuan_video_vae_bf16.safetensors."
BLOCK_LISTS = ("down_block_types", "up_block_types")
DIFFUSERS_BLOCKS = {
    "HunyuanVideoDownBlock3D": "DownEncoderBlockCausal3D",
    "HunyuanVideoUpBlock3D": "UpDecoderBlockCausal3D",
}
RULES = tuple(  # ComfyUI's decoder counts blocks from the output, the released one from the latents
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        *((rf"^decoder\.up\.{n}\.block\.", f"decoder.up_blocks.{BLOCKS - 1 - n}.resnets.") for n in range(BLOCKS)),
        *(
            (rf"^decoder\.up\.{n}\.upsample\.", f"decoder.up_blocks.{BLOCKS - 1 - n}.upsamplers.0.")
            for n in range(BLOCKS)
        ),
        (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", r".conv_shortcut."),
    )
)


def official_vae_name(name: str) -> str:
    """The released name of one of ComfyUI's; another name stays."""
    for pattern, replacement in RULES:
        name = pattern.sub(replacement, name)
    return name


def detect_vae(shapes: Shapes, metadata: Mapping[str, Any]) -> Match | None:
    """What VAE these tensors are; None if they are none of this family."""
    prefix = _prefix(shapes)
    if prefix is None:
        return None
    released = prefix + RELEASED_ANCHOR in shapes
    layout = "released or diffusers names" if released else "ComfyUI's names"
    latent = shapes.get(prefix + LATENT, ())
    refusal = None
    if len(latent) != 5:
        refusal = "a video VAE without quantization convolutions (HunyuanVideo-1.5 or another)"
    elif latent[0] != VaeConfig().latent_channels:
        refusal = f"a video VAE with {latent[0]} latent channels"
    return Match("vae", f"VAE in {layout}" + (f", prefix {prefix}" if prefix else ""), refusal)


def _prefix(shapes: Shapes) -> str | None:
    return next(
        (
            p
            for p in PREFIXES
            if any(len(shapes.get(p + anchor, ())) == 5 for anchor in (RELEASED_ANCHOR, COMFY_ANCHOR))
        ),
        None,
    )


def open_component(path: Path, hints: Hints) -> ComponentSource:
    """The VAE from a file or a folder. Raises CheckpointError for another model, or sizes that cannot be told."""
    weights = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    match = detect_vae(shapes, weights.metadata)
    require_match(match, path, "the VAE of HunyuanVideo", list(shapes), REMEDY)
    prefix, released = _prefix(shapes) or "", (_prefix(shapes) or "") + RELEASED_ANCHOR in shapes
    plain = {
        name.removeprefix(prefix): _as_linear(tensor) if ".mid." in name else tensor
        for name, tensor in weights.tensors.items()
    }
    tensors = plain if released else renamed_once(plain, official_vae_name, path, REMEDY)
    config = _config(path, hints, {name: tensor.shape for name, tensor in tensors.items()})
    return ComponentSource(weights.path, weights.bytes, tensors, config)


def _as_linear(tensor: LazyTensor) -> LazyTensor:
    """[out, in, 1, 1, 1], a convolution over single positions, as the linear layer [out, in] that it is."""
    if len(tensor.shape) != 5 or tensor.shape[2:] != (1, 1, 1):
        return tensor
    shape = tensor.shape[:2]
    return LazyTensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def _config(path: Path, hints: Hints, shapes: Shapes) -> dict[str, Any]:
    """The config.json that the user names or that lies beside the weights, if it has their widths; else the released
    one."""
    names = [f"encoder.down_blocks.{block}.resnets.0.conv1.conv.weight" for block in range(BLOCKS)]
    widths = [shapes.get(name, (0,))[0] for name in names]
    for place in (hints.config, path):
        config = config_beside(place)
        if config.get("block_out_channels") == widths:
            return _released_words(config)
    released = VaeConfig()
    if tuple(widths) != released.block_out_channels:
        wanted = list(released.block_out_channels)
        raise CheckpointError(
            f"{path} has blocks {widths} wide, the released VAE {wanted}, and beside it is no config.json with these",
            REMEDY,
        )
    return released.to_dict()


def _released_words(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with diffusers' names of blocks replaced; they compute the same."""
    lists = {key: value for key, value in config.items() if key in BLOCK_LISTS and isinstance(value, list)}
    return config | {key: [DIFFUSERS_BLOCKS.get(str(kind), kind) for kind in value] for key, value in lists.items()}
