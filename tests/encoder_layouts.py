"""The goldens' text encoders and a small VAE, written in the layouts in which people have them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from torch import Tensor

from goldens import FOLDER, golden, names, weights
from lowvram_i2v.convert.sources.text_encoder import GGUF_NAMES
from lowvram_i2v.kernels.scheme import SCHEMES
from lowvram_i2v.text.clip import official_clip_name
from lowvram_i2v.text.llava import official_llava_name

Tensors = dict[str, Tensor]
LLAVA_FOLDER, CLIP_FOLDER = (FOLDER / name for name in golden(names("F_text")[0]).info["config"]["hf_folders"])
VISION = ("vision_model.", "multi_modal_projector.")
QUANTIZED = r"model\.layers\.\d+\..*_proj\.weight"
TO_HUGGING_FACE = {
    "model.": "language_model.model.",
    "vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
}
TO_TRANSFORMERS_5 = {
    "model.": "model.language_model.",
    "vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def llava() -> Tensors:
    """Under the model folder's names, float32."""
    return _ours(LLAVA_FOLDER, official_llava_name)


def clip() -> Tensors:
    return _ours(CLIP_FOLDER, official_clip_name)


def _ours(folder: Path, rename: Callable[[str], str | None]) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in weights(str(file.relative_to(FOLDER))).items()}
    return {ours: value for name, value in tensors.items() if (ours := rename(name))}


def language(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(VISION)}


def vision(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith(VISION)}


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: value.to(dtype) for name, value in tensors.items()}


def prefixed(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> Tensors:
    result = {}
    for name, value in tensors.items():
        ours = next(prefix for prefix in prefixes if name.startswith(prefix))
        result[prefixes[ours] + name.removeprefix(ours)] = value
    return result


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata)
    return path


def blob() -> Tensor:
    """The bytes of tokenizer.json, as ComfyUI's text encoder files carry them."""
    return torch.frombuffer(bytearray((LLAVA_FOLDER / "tokenizer.json").read_bytes()), dtype=torch.uint8)


def comfy_language(tensors: Mapping[str, Tensor], fp8: bool = False, tokenizer: bool = True) -> Tensors:
    """llava_llama3_fp16 or llava_llama3_fp8_scaled: with language head, tokenizer and, if fp8, scales and marker."""
    result = {**language(tensors), "lm_head.weight": tensors["model.embed_tokens.weight"]}
    if fp8:
        for name in [name for name in result if re.fullmatch(QUANTIZED, name)]:
            layer = name.removesuffix(".weight")
            parts = SCHEMES["fp8"].quantize(result.pop(name).float())
            result |= {f"{layer}.{suffix}": part for suffix, part in parts.items()}
        result["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    return result | ({"tokenizer": blob()} if tokenizer else {})


def quanto(tensors: Mapping[str, Tensor]) -> Tensors:
    """Hugging Face's names, the language model's projections as int8 rows."""
    result: Tensors = {}
    for name, value in tensors.items():
        if re.fullmatch(QUANTIZED, name):
            scale = (value.float().abs().amax(1, keepdim=True) / 127).bfloat16()
            result[f"{name}._data"] = (value.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            result[f"{name}._scale"] = scale
            layer = name.removesuffix(".weight")
            result |= {f"{layer}.input_scale": torch.ones(()), f"{layer}.output_scale": torch.ones(())}
        else:
            result[name] = value
    return prefixed(result, TO_HUGGING_FACE)


def gguf_name(ours: str) -> str:
    parts = {part: name for name, part in GGUF_NAMES.items()}
    found = re.fullmatch(r"model\.(?:layers\.(\d+)\.)?(.+)\.weight", ours)
    assert found
    return f"{f'blk.{found[1]}.' if found[1] else ''}{parts[found[2]]}.weight"


def permuted(value: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to the rows of queries and keys."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def save_gguf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
    type_: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    split: str = "llama-bpe",
    tokenizer: bool = True,
) -> Path:
    """A language model as llama.cpp's converter writes it. config: LLaMA's config.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if tokenizer:
        _add_vocabulary(writer, split, int(tensors["model.embed_tokens.weight"].shape[0]))
    for name, tensor in {**language(tensors), "output": tensors["model.embed_tokens.weight"]}.items():
        value = tensor.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", key_heads)):
            value = permuted(value, count) if part in name else value
        type_of = type_ if value.ndim == 2 else GGMLQuantizationType.F32
        stored = "output.weight" if name == "output" else gguf_name(name)
        writer.add_tensor(stored, quants.quantize(value, type_of), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: GGUFWriter, split: str, rows: int) -> None:
    """All ids up to the embeddings' rows; those without a token are unused ones, as llama.cpp fills them in."""
    values = json.loads((LLAVA_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: (token, 1) for token, number in values["model"]["vocab"].items()}
    tokens |= {token["id"]: (token["content"], 3) for token in values["added_tokens"]}
    listed = [tokens.get(number, (f"[PAD{number}]", 5)) for number in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]])


def vae() -> Tensors:
    """Official names."""
    return dict(weights(golden(names("E_vae_plain")[0]).info["weights"]["file"]))


def save_hollow(shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str = "BF16") -> Path:
    """A file of zeros of any size that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return path
