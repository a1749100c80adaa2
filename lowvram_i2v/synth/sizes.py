"""The two sizes of a synthetic checkpoint: configurations as the released files spell them. No torch here.

Invariant: `full` has the released model's sizes; its config.json leaves out what the released one leaves
out. Token ids are not here: they come from the tokenizer that is written beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import Variant


@dataclass(frozen=True)
class Size:
    """One size. llava_text, llava_vision, clip: keys of the Hugging Face configs. llava_shards: files."""

    transformer: TransformerConfig
    vae: VaeConfig
    llava_text: dict[str, Any]
    llava_vision: dict[str, Any]
    clip: dict[str, Any]
    llava_shards: int


SIZES = {
    "tiny": Size(
        TransformerConfig(hidden_size=256, heads=2, double_blocks=2, single_blocks=2, text_dim=64, pooled_dim=48),
        VaeConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=8),
        llava_text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "vocab_size": 1024,
        },
        llava_vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "projection_dim": 32,
        },
        clip={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "projection_dim": 48,
            "vocab_size": 1024,
        },
        llava_shards=2,
    ),
    "full": Size(
        TransformerConfig(),
        VaeConfig(),
        llava_text={"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320},
        llava_vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "projection_dim": 768,
        },
        clip={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
            "vocab_size": 49408,
        },
        llava_shards=4,
    ),
}


def transformer_config(size: Size, variant: Variant) -> TransformerConfig:
    """The size's transformer as the variant has it; latent_concat weights come without a guidance
    embedder."""
    return replace(
        size.transformer,
        in_channels=variant.in_channels,
        guidance_embed=variant.replaces_first_frame,
    )


def llava_json(size: Size, ids: dict[str, int]) -> dict[str, Any]:
    """LLaVA's config.json. ids: of the tokens "begin", "end", "image" and "pad"."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": ids["image"],
        "model_type": "llava",
        "pad_token_id": ids["pad"],
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": ids["begin"],
            "eos_token_id": ids["end"],
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "float16",
            **size.llava_text,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "image_size": 336,
            "model_type": "clip_vision_model",
            "patch_size": 14,
            **size.llava_vision,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def clip_json(size: Size) -> dict[str, Any]:
    """The config.json of a whole CLIP, of which only the text side is written. End token 2 is the released
    spelling of "the highest id of the sequence"."""
    text = {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        **size.clip,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": size.clip["projection_dim"],
        "text_config": text,
        "torch_dtype": "float32",
    }
