"""config.json of the two text encoders where files come without one: from shapes and key-values.

Invariants: what shapes do not show is the released models' (rope theta 500000, heads of 128 in LLaMA and of 64 in
CLIP); where the released heads do not divide a width, the model is another one and nothing is guessed. The result has
the keys of the released config.json, so the rest of the program need not know where it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.template import IMAGE

LLAMA_HEAD, CLIP_HEAD = 128, 64
WHOLE = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
ASK = "Put the config.json that belongs to it beside it, or into the folder that --tokenizer names."


def llava_config(shapes: Shapes, ids: Mapping[str, int], text: dict[str, Any], path: Path) -> dict[str, Any]:
    """The whole LLaVA's. shapes: under the model folder's names. ids: the tokenizer's marks.

    text: what is known of the language model (a LLaMA config.json, or key-values): heads, theta, eps.
    Raises CheckpointError naming the tensor that is missing or the width that cannot be divided.
    """
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": ids[IMAGE],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": _llama_config(shapes, text, path),
        "vision_config": _vision_config(shapes, path),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return config | ({"pad_token_id": ids["<pad>"]} if "<pad>" in ids else {})


def _llama_config(shapes: Shapes, known: dict[str, Any], path: Path) -> dict[str, Any]:
    vocabulary, width = require_shape(shapes, "model.embed_tokens.weight", 2, path)
    queries = require_shape(shapes, "model.layers.0.self_attn.q_proj.weight", 2, path)[0]
    keys = require_shape(shapes, "model.layers.0.self_attn.k_proj.weight", 2, path)[0]
    heads = known.get("num_attention_heads") or _heads(queries, LLAMA_HEAD, "language model", path)
    head = queries // heads if type(heads) is int and heads > 0 else 0
    key_heads = known.get("num_key_value_heads") or (keys // head if head else 0)
    if not head or head * heads != queries or head * key_heads != keys:
        raise CheckpointError(
            f"{path}: {heads} heads ({key_heads} for keys) do not fit projections of {queries} and {keys} rows", ASK
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": require_shape(shapes, "model.layers.0.mlp.gate_proj.weight", 2, path)[0],
        "max_position_embeddings": known.get("max_position_embeddings", 8192),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": _depth(shapes, "model.layers"),
        "num_key_value_heads": key_heads,
        "rms_norm_eps": known.get("rms_norm_eps", 1e-05),
        "rope_theta": known.get("rope_theta", 500000.0),
        "vocab_size": vocabulary,
        **({} if head * heads == width else {"head_dim": head}),
    }


def gguf_llama(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the key-values of a GGUF file of architecture `llama` say, under the keys of a config.json."""
    keys = {
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "rope_theta": "llama.rope.freq_base",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "llama.context_length",
    }
    found = {name: metadata[key] for name, key in keys.items() if _positive(metadata.get(key), name in WHOLE)}
    if "rms_norm_eps" in found:  # stored as float32
        found["rms_norm_eps"] = float(f"{found['rms_norm_eps']:.6g}")
    return found


def _positive(value: Any, whole: bool) -> bool:
    return type(value) in ((int,) if whole else (int, float)) and 0 < value < 2**31


def _vision_config(shapes: Shapes, path: Path) -> dict[str, Any]:
    patch = require_shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4, path)
    positions = require_shape(shapes, "vision_model.embeddings.position_embedding.weight", 2, path)[0]
    return {
        "hidden_size": patch[0],
        "image_size": math.isqrt(max(0, positions - 1)) * patch[2],
        "intermediate_size": require_shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2, path)[0],
        "model_type": "clip_vision_model",
        "num_attention_heads": _heads(patch[0], CLIP_HEAD, "vision tower", path),
        "num_hidden_layers": _depth(shapes, "vision_model.encoder.layers"),
        "patch_size": patch[2],
        "projection_dim": 768,
    }


def clip_config(shapes: Shapes, path: Path) -> dict[str, Any]:
    """CLIP's text side. End token 2 is the released spelling of "the highest id of the sequence"."""
    vocabulary, width = require_shape(shapes, "text_model.embeddings.token_embedding.weight", 2, path)
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": require_shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2, path)[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": require_shape(shapes, "text_model.embeddings.position_embedding.weight", 2, path)[0],
        "model_type": "clip_text_model",
        "num_attention_heads": _heads(width, CLIP_HEAD, "CLIP", path),
        "num_hidden_layers": _depth(shapes, "text_model.encoder.layers"),
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocabulary,
    }


def clip_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """CLIP's text side of a config.json that may describe the whole model."""
    text, more = config.get("text_config"), config.get("text_config_dict")
    if not isinstance(text, dict):
        return config
    return {"model_type": "clip_text_model", **text, **(more if isinstance(more, dict) else {})}


def _heads(width: int, head: int, what: str, path: Path) -> int:
    if not width or width % head:
        raise CheckpointError(
            f"{path}: a {what} {width} wide is not the released one, and its shapes do not tell the number of heads",
            ASK,
        )
    return width // head


def require_shape(shapes: Shapes, name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    """A tensor's shape. Raises CheckpointError if it is not there, or has not so many dimensions."""
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions:
        found = "is missing" if shape is None else f"is {list(shape)}"
        raise CheckpointError(f"{path}: {name} {found}", "Download or copy it again.")
    return shape


def _depth(shapes: Shapes, prefix: str) -> int:
    """Layers up to the highest number; the comparison of all tensors that follows finds gaps."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\.")
    return 1 + max((int(found[1]) for name in shapes if (found := pattern.match(name))), default=-1)
