"""What a component must hold: tensor names (ours) and shapes, from its configuration alone.

Invariant: no weight is read and transformers is not imported. Transformer and VAE are asked themselves, on
the meta device; LLaVA and CLIP follow the formulas below, with the defaults that transformers gives keys
left out of a released config.json.
"""

from __future__ import annotations

from typing import Any

import torch

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.vae.config import VaeConfig

Shapes = dict[str, tuple[int, ...]]
MOST_LAYERS = 1000


def transformer_shapes(config: TransformerConfig) -> Shapes:
    from lowvram_i2v.dit.transformer import HunyuanVideoTransformer

    with torch.device("meta"):
        return _of(HunyuanVideoTransformer(config))


def vae_shapes(config: VaeConfig) -> Shapes:
    from lowvram_i2v.vae.decoder import VaeDecoder
    from lowvram_i2v.vae.encoder import VaeEncoder

    with torch.device("meta"):
        return _of(VaeEncoder(config)) | _of(VaeDecoder(config))


def _of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def llava_shapes(config: dict[str, Any]) -> Shapes:
    """All that `text_encoder.safetensors` holds, the layers included that this program does not use."""
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    width, mlp = _size(text, "hidden_size", 4096), _size(text, "intermediate_size", 11008)
    heads = _size(text, "num_attention_heads", 32)
    head_dim = _size(text, "head_dim", width // heads)
    queries, keys = heads * head_dim, _size(text, "num_key_value_heads", heads) * head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (_size(text, "vocab_size", 32000), width)}
    for layer in range(_size(text, "num_hidden_layers", 32, MOST_LAYERS)):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("self_attn.q_proj", (queries, width)),
                ("self_attn.k_proj", (keys, width)),
                ("self_attn.v_proj", (keys, width)),
                ("self_attn.o_proj", (width, queries)),
                ("mlp.gate_proj", (mlp, width)),
                ("mlp.up_proj", (mlp, width)),
                ("mlp.down_proj", (width, mlp)),
                ("input_layernorm", (width,)),
                ("post_attention_layernorm", (width,)),
            )
        }
    shapes["model.norm.weight"] = (width,)
    vision_width, patch = _size(vision, "hidden_size", 768), _size(vision, "patch_size", 32)
    positions = (_size(vision, "image_size", 224) // patch) ** 2 + 1
    shapes["vision_model.embeddings.class_embedding"] = (vision_width,)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (vision_width, 3, patch, patch)
    shapes["vision_model.embeddings.position_embedding.weight"] = (positions, vision_width)
    shapes |= _pair("vision_model.pre_layrnorm", (vision_width,))
    shapes |= _clip_layers("vision_model", vision, defaults=(768, 3072, 12))
    shapes |= _pair("vision_model.post_layernorm", (vision_width,))
    shapes |= _pair("multi_modal_projector.linear_1", (width, vision_width))
    return shapes | _pair("multi_modal_projector.linear_2", (width, width))


def clip_shapes(config: dict[str, Any]) -> Shapes:
    """All that `text_encoder_2.safetensors` holds. config: CLIP's text side."""
    width = _size(config, "hidden_size", 512)
    embeddings = "text_model.embeddings"
    return {
        f"{embeddings}.token_embedding.weight": (_size(config, "vocab_size", 49408), width),
        f"{embeddings}.position_embedding.weight": (_size(config, "max_position_embeddings", 77), width),
        **_clip_layers("text_model", config, defaults=(512, 2048, 12)),
        **_pair("text_model.final_layer_norm", (width,)),
    }


def _clip_layers(prefix: str, config: dict[str, Any], defaults: tuple[int, int, int]) -> Shapes:
    """The layers of either side of a CLIP. defaults: width, MLP width, layers."""
    width = _size(config, "hidden_size", defaults[0])
    mlp = _size(config, "intermediate_size", defaults[1])
    shapes: Shapes = {}
    for layer in range(_size(config, "num_hidden_layers", defaults[2], MOST_LAYERS)):
        at = f"{prefix}.encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _pair(f"{at}.self_attn.{name}", (width, width))
        shapes |= _pair(f"{at}.layer_norm1", (width,))
        shapes |= _pair(f"{at}.mlp.fc1", (mlp, width)) | _pair(f"{at}.mlp.fc2", (width, mlp))
        shapes |= _pair(f"{at}.layer_norm2", (width,))
    return shapes


def _pair(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(f"the text encoder's config.json has no {name}", "It must be a LLaVA's config.json.")
    return part


def _size(config: dict[str, Any], name: str, default: int, largest: int = 2**31 - 1) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= largest:
        raise CheckpointError(f"config.json: {name} is {value!r:.50}", f"It must be a whole number in 1..{largest}.")
    return value
