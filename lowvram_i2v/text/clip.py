"""The CLIP text encoder that gives the pooled vector: transformers' class, and the names of its tensors.

`text_encoder_2.safetensors` uses the published names (`text_model.*`); the class itself has dropped that
level. The published file may be a whole CLIP, of which only the text side is kept.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowvram_i2v.errors import CheckpointError

_LEVEL = "text_model."
_NOT_STORED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def build_clip(config: dict[str, Any]) -> nn.Module:
    """`transformers.CLIPTextModel` in eval mode, parameters on the meta device, buffers real and on the CPU.

    config: the published config.json, of a whole CLIP or of its text side. Raises CheckpointError for another
    model.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    if config.get("model_type") not in ("clip", "clip_text_model"):
        raise CheckpointError(
            f"the second text encoder's model_type is {config.get('model_type')!r}",
            "It must be a CLIP text model.",
        )
    text = copy.deepcopy(config.get("text_config") or config)
    # a surrounding torch.device("meta") would take the buffers too
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model = CLIPTextModel(CLIPTextConfig.from_dict(text, attn_implementation="sdpa"))
    built: nn.Module = model.eval()
    return built


def clip_tensor_name(module_name: str) -> str:
    """Name in `text_encoder_2.safetensors` of a parameter of the built module."""
    return _LEVEL + module_name


def official_clip_name(name: str) -> str | None:
    """Name in `text_encoder_2.safetensors` of a published tensor; None for what is not stored (the vision
    side, the projections, the position table). Raises CheckpointError for a name that is not CLIP's."""
    if name.startswith(_NOT_STORED) or name.endswith(".position_ids"):
        return None
    if not name.startswith(_LEVEL):
        raise CheckpointError(f"{name!r} is not a tensor of CLIP", "The second text encoder must be a CLIP.")
    return name
