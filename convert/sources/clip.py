"""The second text encoder: CLIP ViT-L/14's text side.

    text_model.*                          clip_l.safetensors, Hugging Face text-only folders
    text_model.*, vision_model.*, ...     openai/clip-vit-large-patch14 whole; the rest is left behind
    embeddings.*, encoder.*               the same as transformers 5 names it in memory

Refused, with what it is: OpenCLIP's own layout, and the wider CLIPs that lie beside clip_l in ComfyUI's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints
from lowvram_i2v.convert.sources.component_files import (
    Match,
    config_beside,
    folder_of,
    open_weights,
    renamed_once,
    require_match,
)
from lowvram_i2v.convert.sources.encoder_configs import clip_config, clip_text_config
from lowvram_i2v.convert.sources.quantization import decode
from lowvram_i2v.convert.sources.tokenizer_files import CLIP_FILES, NEEDED, tokenizer_files
from lowvram_i2v.text.clip import official_clip_name

LEVEL = "text_model."
EMBEDDING = "embeddings.token_embedding.weight"
BARE = ("embeddings.", "encoder.", "final_layer_norm.")
OPENCLIP = ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.ln_1.weight")
WIDER = {1024: "the CLIP of OpenCLIP's ViT-H", 1280: "CLIP-G (ViT-bigG)"}
REMEDY = "Give clip_l.safetensors, or the folder of openai/clip-vit-large-patch14."


def detect_clip(shapes: Shapes, metadata: Mapping[str, Any]) -> Match | None:
    """What CLIP these tensors are; None if they are none."""
    if any(name.endswith(OPENCLIP) for name in shapes):
        return Match("text_encoder_2", "CLIP in OpenCLIP's names", "a CLIP in OpenCLIP's own layout")
    level = LEVEL if LEVEL + EMBEDDING in shapes else ""
    width = shapes.get(level + EMBEDDING, ())
    if len(width) != 2 or f"{level}encoder.layers.0.self_attn.q_proj.weight" not in shapes:
        return None
    layout = "whole CLIP" if any(name.startswith("vision_model.") for name in shapes) else "CLIP, text side"
    refusal = f"{WIDER[width[1]]}, {width[1]} wide" if width[1] in WIDER else None
    return Match("text_encoder_2", layout, refusal)


def open_component(path: Path, hints: Hints) -> ComponentSource:
    """CLIP's text side from a file or a folder. Raises CheckpointError for another model, or with all that is
    missing."""
    weights = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    require_match(detect_clip(shapes, weights.metadata), path, "CLIP ViT-L/14", list(shapes), REMEDY)
    read = decode(weights)
    tensors = renamed_once(read.tensors, _our_name, path, REMEDY)
    tokenizer = next((files for place in (hints.tokenizer, path) if place and (files := _tokenizer(place))), ())
    missing = [] if tokenizer else [f"tokenizer: {NEEDED['text_encoder_2']}"]
    raise_listed(f"{path} is not a whole text encoder", missing, "")
    kinds = ("clip", "clip_text_model")
    found = [config_beside(place, kinds) for place in (hints.config, path, hints.tokenizer)]
    config = next((clip_text_config(config) for config in found if config), None)
    our_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = config or clip_config(our_shapes, path)
    return ComponentSource(weights.path, weights.bytes, tensors, config, tokenizer, read.notices)


def _tokenizer(place: Path) -> tuple[Path, ...]:
    return tokenizer_files(folder_of(place), CLIP_FILES)


def _our_name(name: str) -> str | None:
    return official_clip_name(LEVEL + name if name.startswith(BARE) else name)
