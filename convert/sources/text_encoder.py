"""The text encoder: LLaVA, which is a LLaMA, a CLIP vision tower, and a projector between them.

    LLaMA                          vision tower                 projector
    language_model.model.*         vision_tower.vision_model.*  multi_modal_projector.*        Hugging Face, quanto
    model.language_model.*         model.vision_tower.*         model.multi_modal_projector.*  transformers 5
    model.*                        vision_model.*               multi_modal_projector.*        ComfyUI, in two files
    model.*  or without a prefix   -                            -                              language model alone
    token_embd, blk.0.attn_q, ...  -                            -                              GGUF

The third line is ours. A language model alone needs the vision tower from another file. GGUF files have the rows of
queries and keys in another order (of rotary pairs side by side), which is undone.

Invariants: names decide, and each has one counterpart; all that is missing is reported at once; the tokenizer has the
template's marks, and its id for the picture is the model's. Left out: GGUF vision towers (mmproj).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints, LazyTensor, SmallFile
from lowvram_i2v.convert.sources.component_files import (
    Match,
    config_beside,
    folder_of,
    open_weights,
    renamed_once,
    require_match,
)
from lowvram_i2v.convert.sources.containers import DOWNLOAD, GGUF, Container
from lowvram_i2v.convert.sources.encoder_configs import gguf_llama, llava_config, require_shape
from lowvram_i2v.convert.sources.gguf_vocabulary import read_vocabulary
from lowvram_i2v.convert.sources.quantization import Decoded, decode
from lowvram_i2v.convert.sources.tokenizer_files import (
    LLAVA_FILES,
    NEEDED,
    HeldFile,
    gguf_tokenizer,
    template_ids,
    tokenizer_files,
)
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.template import IMAGE

EMBEDDINGS = "model.embed_tokens.weight"
LANGUAGE, VISION, PROJECTOR = "model.", "vision_model.", "multi_modal_projector."
PREFIXES = {  # the longer before what it starts with
    "language_model.model.": LANGUAGE,
    "model.language_model.": LANGUAGE,
    "model.vision_tower.vision_model.": VISION,
    "model.vision_tower.": VISION,
    "vision_tower.vision_model.": VISION,
    "vision_tower.": VISION,
    "vision_model.": VISION,
    "model.multi_modal_projector.": PROJECTOR,
    "multi_modal_projector.": PROJECTOR,
    "model.": LANGUAGE,
    **{name: LANGUAGE + name for name in ("embed_tokens.", "layers.", "norm.")},
}
LAYOUTS = {
    "language_model.model.": "LLaVA in Hugging Face's names",
    "model.language_model.": "LLaVA in transformers 5's names",
    "model.": "LLaMA in ComfyUI's names",
    "": "LLaMA in diffusers' names",
}
GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NOT_STORED = ("lm_head.weight", "output.weight", "tokenizer", "scaled_fp8")  # or derived from the configuration:
DERIVED = (".position_ids", ".rotary_emb.inv_freq")
BLOB = "tokenizer"
LARGEST_BLOB = 64 * 2**20  # bytes; Llama 3's has 9 million
OTHER_FAMILIES = (  # in the first layer: Qwen 2, Qwen 3, Gemma
    *("self_attn.q_proj.bias", "self_attn.q_norm.weight", "pre_feedforward_layernorm.weight"),
    *("attn_q.bias", "attn_q_norm.weight", "post_ffw_norm.weight"),
)
RELEASED = (128320, 4096)  # rows and width of the embeddings
LARGE = 2048  # narrower models are made for tests
REMEDY = "Give llava-llama-3-8b-v1_1: its Hugging Face folder, or llava_llama3_fp8_scaled.safetensors."
MISSING = {
    "language model": "give llava_llama3_fp8_scaled.safetensors, or another, with --text-encoder",
    "vision tower": "give llava_llama3_vision.safetensors too, with --vision",
}


def detect_text_encoder(shapes: Shapes, metadata: Mapping[str, Any]) -> Match | None:
    """What part of a LLaVA these tensors are; None if they are none."""
    vision = any(_under(name, VISION) for name in shapes) and any(_under(name, PROJECTOR) for name in shapes)
    prefix = next((p for p in LAYOUTS if f"{p}layers.0.post_attention_layernorm.weight" in shapes), None)
    embedding = shapes.get("token_embd.weight" if prefix is None else f"{prefix}embed_tokens.weight", ())
    if prefix is not None:
        layout = LAYOUTS[prefix]
    elif "blk.0.attn_q.weight" in shapes and metadata.get("general.architecture", "llama") == "llama":
        layout = "LLaMA in a GGUF file"
    else:
        return Match("text_encoder", "LLaVA's vision tower", lacks=("language model",)) if vision else None
    refusal = None
    first = "blk.0." if prefix is None else f"{prefix}layers.0."
    if any(first + name in shapes for name in OTHER_FAMILIES):
        refusal = "a language model of another family"
    elif len(embedding) == 2 and embedding[1] > LARGE and embedding != RELEASED:
        plain = " (plain Llama 3, or an edition of LLaVA without its picture token)" if embedding[0] == 128256 else ""
        refusal = f"a LLaMA with embeddings of {list(embedding)} instead of {list(RELEASED)}{plain}"
    return Match("text_encoder", layout, refusal, () if vision else ("vision tower",))


def open_component(path: Path, hints: Hints) -> ComponentSource:
    """The text encoder from a file or a folder that has all of it."""
    return open_text_encoder(path, hints)


def open_text_encoder(path: Path, hints: Hints, vision: Path | None = None) -> ComponentSource:
    """LLaVA from one file or folder, or from two.

    path: has the language model. vision: has vision tower and projector, if `path` has not, or others to be used.
    Raises CheckpointError for another model, or with all that is missing.
    """
    weights = open_weights(path)
    _require(weights, path)
    read = _decoded(weights)
    tensors = renamed_once(read.tensors, our_llava_name, path, REMEDY)
    if weights.kind == GGUF:
        tensors = _unpermuted(tensors, gguf_llama(weights.metadata), path)
    total, notices = weights.bytes, read.notices
    if vision is not None:
        seen = open_weights(vision)
        _require(seen, vision)
        more = _decoded(seen)
        tensors |= {
            name: tensor
            for name, tensor in renamed_once(more.tensors, our_llava_name, vision, REMEDY).items()
            if name.startswith((VISION, PROJECTOR))
        }
        total, notices = total + seen.bytes, (*notices, *more.notices)
    tokenizer = _tokenizer(weights, path, hints)
    _require_all(path, tensors, tokenizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = _config(weights, path, hints, shapes, template_ids(tokenizer, path))
    return ComponentSource(weights.path, total, tensors, config, tokenizer, notices)


def _decoded(weights: Container) -> Decoded:
    """Without the tokenizer, whose bytes are no codes of a weight."""
    return decode(replace(weights, tensors={name: t for name, t in weights.tensors.items() if name != BLOB}))


def our_llava_name(name: str) -> str | None:
    """Name in the model folder of a tensor of any of the layouts; None if it is not stored there.

    Raises CheckpointError for a name that is not LLaVA's.
    """
    if name.endswith(DERIVED) or name in NOT_STORED or name.endswith(".lm_head.weight"):
        return None
    if found := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name):
        layer, part = found.groups()
        if part in GGUF_NAMES:
            return f"{LANGUAGE}{f'layers.{layer}.' if layer else ''}{GGUF_NAMES[part]}.weight"
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    raise CheckpointError(f"{name!r} is not a tensor of the LLaVA text encoder", REMEDY)


def _under(name: str, ours: str) -> bool:
    return any(name.startswith(prefix) for prefix, target in PREFIXES.items() if target == ours)


def _require(weights: Container, path: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    require_match(detect_text_encoder(shapes, weights.metadata), path, "LLaVA", list(shapes), REMEDY)


def _require_all(path: Path, tensors: Mapping[str, LazyTensor], tokenizer: tuple[SmallFile, ...]) -> None:
    """One error for all that is missing."""
    starts = {"language model": (LANGUAGE,), "vision tower": (VISION, PROJECTOR)}
    missing = [
        f"{part}: {MISSING[part]}"
        for part, prefixes in starts.items()
        if not all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)
    ]
    missing += [] if tokenizer else [f"tokenizer: {NEEDED['text_encoder']}"]
    raise_listed(f"{path} is not a whole text encoder. Missing", missing, "")


def _unpermuted(tensors: dict[str, LazyTensor], known: dict[str, Any], path: Path) -> dict[str, LazyTensor]:
    """Queries and keys of a GGUF file with each head's rows in their first order: all first halves of rotary pairs,
    then all second halves."""
    heads = {"q_proj": known.get("num_attention_heads"), "k_proj": known.get("num_key_value_heads")}
    result = {}
    for name, tensor in tensors.items():
        kind = name.split(".")[-2] if name.startswith("model.layers.") else ""
        count = heads.get(kind)
        rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        if kind in heads and (type(count) is not int or count < 1 or rows % (2 * count)):
            raise CheckpointError(
                f"{path}: {count} heads in its key-values do not fit {name} {list(tensor.shape)}", REMEDY
            )
        result[name] = _unpermuted_rows(tensor, count) if isinstance(count, int) else tensor
    return result


def _unpermuted_rows(tensor: LazyTensor, heads: int) -> LazyTensor:
    def read() -> Tensor:
        values = tensor.read()
        return values.reshape(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _tokenizer(weights: Container, path: Path, hints: Hints) -> tuple[SmallFile, ...]:
    """From the folder that the user names, out of the file itself, or from beside it."""
    if hints.tokenizer is not None:
        return tokenizer_files(hints.tokenizer, LLAVA_FILES)
    if BLOB in weights.tensors:
        return (_blob(weights.tensors[BLOB], path),)
    made = gguf_tokenizer(read_vocabulary(weights.path), path) if weights.kind == GGUF else None
    return (made,) if made else tokenizer_files(folder_of(path), LLAVA_FILES)


def _blob(tensor: LazyTensor, path: Path) -> HeldFile:
    if tensor.bytes > LARGEST_BLOB:
        raise CheckpointError(f"{path}: the tokenizer in it has {tensor.bytes} bytes", DOWNLOAD)
    return HeldFile("tokenizer.json", tensor.read().flatten().view(torch.uint8).numpy().tobytes())


def _config(weights: Container, path: Path, hints: Hints, shapes: Shapes, ids: dict[str, int]) -> dict[str, Any]:
    """The released config.json where one lies with the weights or the tokenizer, else one made from the shapes."""
    places = [config_beside(place) for place in (hints.config, path, hints.tokenizer)]
    places.append(_config_inside(weights.metadata))
    rows = require_shape(shapes, EMBEDDINGS, 2, path)[0]
    if beyond := [f"{token} ({number})" for token, number in ids.items() if number >= rows]:
        raise CheckpointError(
            f"{path} has {rows} embeddings, the tokenizer knows {', '.join(beyond)}",
            "Take both from the same release.",
        )
    config = next((found for found in places if found.get("model_type") == "llava"), None)
    if config is None:
        llama = next((found for found in places if found.get("model_type") == "llama"), {})
        return llava_config(shapes, ids, llama | gguf_llama(weights.metadata), path)
    image = config.get("image_token_index", config.get("image_token_id", ids[IMAGE]))
    if image != ids[IMAGE]:
        raise CheckpointError(
            f"{path}: the config.json gives the picture the id {image}, the tokenizer {ids[IMAGE]}",
            "Take both from the same release.",
        )
    return config | {"image_token_index": image}


def _config_inside(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json in the header of mmgp's quanto files."""
    try:
        config = json.loads(base64.b64decode(metadata.get("config_base64", "") or "e30="))
    except (ValueError, TypeError, RecursionError):
        config = None
    return config if isinstance(config, dict) else {}
