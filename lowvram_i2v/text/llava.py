"""The LLaVA prompt-and-picture encoder: transformers' class, cut down to the layers whose output is read.

What is read is the hidden state before the last two decoder layers and before the final norm, and the vision
state before the last vision layer. So those layers, the norm and the language head are not built: 0.97 of
8.36 billion parameters. The output is bit-equal to that entry of the full model's hidden states.

Three sets of tensor names meet here: the published ones, the model folder's (`text_encoder.safetensors`;
ComfyUI reads the same), and those of the built module. transformers is imported where it is used: the names
are free.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowvram_i2v.errors import CheckpointError

SKIPPED_LAYERS = 2
"""Decoder layers at the end whose output is not used."""

_REMEDY = "Only the released LLaVA (llava-llama-3-8b, or the same layout in another size) can be the text encoder."
_OFFICIAL_PREFIXES = {
    "language_model.model.": "model.",
    "vision_tower.vision_model.": "vision_model.",
    "vision_tower.": "vision_model.",  # as transformers 5 writes it
    "multi_modal_projector.": "multi_modal_projector.",
}
_BUILT_PREFIXES = {
    "language_model.": "model.",
    "vision_tower.": "vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
}


def build_llava(config: dict[str, Any], skipped_layers: int = SKIPPED_LAYERS) -> nn.Module:
    """`transformers.LlavaModel` in eval mode, parameters on the meta device, buffers real and on the CPU.

    config: the published config.json. Raises CheckpointError if it is not a LLaVA of the layout described
    above.
    """
    from accelerate import init_empty_weights
    from transformers import LlavaConfig, LlavaModel

    if config.get("model_type") != "llava":
        raise CheckpointError(f"the text encoder's model_type is {config.get('model_type')!r}", _REMEDY)
    llava = LlavaConfig.from_dict(copy.deepcopy(config), attn_implementation="sdpa")
    feature = llava.vision_feature_layer
    if not isinstance(feature, int) or llava.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"the text encoder takes vision state {feature!r}, rows {llava.vision_feature_select_strategy!r}",
            _REMEDY,
        )
    llava.text_config.num_hidden_layers -= skipped_layers
    # vision state 0 is the embedding, state n the output of layer n
    vision_layers = llava.vision_config.num_hidden_layers
    llava.vision_config.num_hidden_layers = feature if feature >= 0 else vision_layers + 1 + feature
    llava.vision_feature_layer = -1
    # a surrounding torch.device("meta") would take the buffers too
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model = LlavaModel(llava)
    model.language_model.norm = nn.Identity()
    built: nn.Module = model.eval()
    return built


def image_rows(config: Any) -> int:
    """Rows that the picture takes in the sequence: the vision tower's patches, without its class row.

    config: a built model's `config`."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def llava_tensor_name(module_name: str) -> str:
    """Name in `text_encoder.safetensors` of a parameter of the built module."""
    return _renamed(module_name, _BUILT_PREFIXES)


def official_llava_name(name: str) -> str | None:
    """Name in `text_encoder.safetensors` of a published tensor; None for what is not stored (the language
    head and tables that follow from the configuration). Raises CheckpointError for a name that is not
    LLaVA's."""
    if name == "language_model.lm_head.weight" or name.endswith((".position_ids", ".rotary_emb.inv_freq")):
        return None
    return _renamed(name, _OFFICIAL_PREFIXES)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise CheckpointError(f"{name!r} is not a tensor of the LLaVA text encoder", _REMEDY)
