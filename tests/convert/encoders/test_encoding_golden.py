"""A prompt encoded with weights out of ComfyUI's files is the reference's, to the precision of their storage."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import encoder_layouts as layouts
import pytest
import torch
from PIL import Image
from torch import Tensor

from goldens import FOLDER, Sampled, golden, names, relative_l2
from lowvram_i2v.checkpoint import ModelFolder
from lowvram_i2v.convert.policy import layout
from lowvram_i2v.convert.sources import ComponentSource
from lowvram_i2v.convert.sources.pieces import Pieces, open_pieces
from lowvram_i2v.convert.writer import write_layout
from lowvram_i2v.safetensors_file import open_safetensors
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.encode import pooled_vector, prompt_rows
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer

pytestmark = pytest.mark.golden
REFERENCE = golden(names("F_text")[0])
CPU = torch.device("cpu")


def pieces(folder: Path, dtype: torch.dtype, fp8: bool) -> Pieces:
    llava, clip = layouts.in_dtype(layouts.llava(), dtype), layouts.in_dtype(layouts.clip(), dtype)
    return Pieces(
        text_encoder=layouts.save(layouts.comfy_language(llava, fp8), folder / "text_encoders" / "llava.safetensors"),
        vision=layouts.save(layouts.vision(llava), folder / "clip_vision" / "vision.safetensors"),
        text_encoder_2=layouts.save(clip, folder / "text_encoders" / "clip_l.safetensors"),
        tokenizer=layouts.LLAVA_FOLDER,
        tokenizer_2=layouts.CLIP_FOLDER,
    )


def gguf(folder: Path, config: dict[str, Any]) -> Pieces:
    given = pieces(folder, torch.float32, fp8=False)
    path = layouts.save_gguf(layouts.llava(), config, folder / "llava.gguf", tokenizer=False)
    return replace(given, text_encoder=path)


def model_folder(folder: Path, sources: dict[str, ComponentSource], scheme: str) -> ModelFolder:
    """As convert writes it, but for model.json."""
    files = {}
    for component, source in sources.items():
        path = folder / f"{component}.safetensors"
        own = scheme if component == "text_encoder" or scheme != "fp8" else "bf16"
        made = layout(component, own, source.tensors)
        write_layout(path, made, {"format": "pt"}, torch.device("cpu"), lambda done: None)
        files[component] = open_safetensors(path)
        tokenizer = folder / component
        tokenizer.mkdir()
        for file in source.tokenizer:
            (tokenizer / file.name).write_bytes(file.read_bytes())
    return ModelFolder(folder, cast(Any, None), files)


def encoded(model: ModelFolder, sources: dict[str, ComponentSource], case: str, stride: int) -> tuple[Tensor, Tensor]:
    """The case's rows and its pooled vector."""
    config, prompt = REFERENCE.info["config"], REFERENCE.info["cases"][case]["prompt"]
    image = Image.open(FOLDER / REFERENCE.info["cases"][case]["image"]).convert("RGB")
    llava, clip = (sources[name].config for name in ("text_encoder", "text_encoder_2"))
    with model.load(
        "text_encoder",
        lambda: build_llava(llava, config["hidden_state_skip_layer"]),
        device=CPU,
        dtype=torch.float32,
        file_name=llava_tensor_name,
    ) as encoder:
        tokenizer = LlavaTokenizer(model.path / "text_encoder", config["text_len"])
        rows = prompt_rows(encoder, tokenizer, prompt, image, stride)
    with model.load(
        "text_encoder_2", lambda: build_clip(clip), device=CPU, dtype=torch.float32, file_name=clip_tensor_name
    ) as encoder:
        clip_tokenizer = ClipTokenizer(model.path / "text_encoder_2", clip["max_position_embeddings"])
        pooled = pooled_vector(encoder, clip_tokenizer, prompt)
    return rows, pooled


def errors(folder: Path, given: Pieces, scheme: str) -> tuple[float, float]:
    """Relative L2 of the prompt's rows and of the pooled vector, of the first case with a picture in a file."""
    sources = open_pieces(given, ["text_encoder", "text_encoder_2"])
    found = (re.fullmatch(r"(\w+)\.interleave(\d+)\.hidden_valid_rows", name) for name in sorted(REFERENCE.tensors))
    name, case, stride = next(
        (match[0], match[1], int(match[2]))
        for match in found
        if match
        and f"{match[1]}.text_rows_if_treated_like_long" not in REFERENCE
        and (FOLDER / REFERENCE.info["cases"][match[1]]["image"]).is_file()
    )
    (folder / "model").mkdir()
    rows, pooled = encoded(model_folder(folder / "model", sources, scheme), sources, case, stride)
    expected = REFERENCE[name]
    kept = (
        Sampled(expected.values, expected.stride, tuple(rows.shape)) if isinstance(expected, Sampled) else expected[0]
    )
    result = relative_l2(rows, kept), relative_l2(pooled[None], REFERENCE[f"{case}.clip.pooled"])
    print(scheme, result)
    return result


def test_comfy_files_in_float32(tmp_path: Path) -> None:
    assert max(errors(tmp_path, pieces(tmp_path, torch.float32, fp8=False), "fp32")) < 1e-5


def test_comfy_files_in_float16(tmp_path: Path) -> None:
    """What the rounding of these weights to float16 costs (1.1e-3), and not a bit more: the released layout with the
    same rounded weights gives the same numbers."""
    comfy = errors(tmp_path, pieces(tmp_path, torch.float16, fp8=False), "bf16")
    released = tmp_path / "released"
    llava = layouts.prefixed(layouts.in_dtype(layouts.llava(), torch.float16), layouts.TO_HUGGING_FACE)
    path = layouts.save(llava, released / "model.safetensors")
    clip = layouts.save(layouts.in_dtype(layouts.clip(), torch.float16), released / "clip" / "model.safetensors")
    given = Pieces(text_encoder=path, text_encoder_2=clip, tokenizer=layouts.LLAVA_FOLDER)
    assert errors(released, replace(given, tokenizer_2=layouts.CLIP_FOLDER), "fp32") == comfy
    assert max(comfy) < 2e-3


def test_gguf_file(tmp_path: Path) -> None:
    """Rotary pairs would be torn apart if the rows of queries and keys were not put back."""
    config = {"rms_norm_eps": 1e-5, "rope_theta": 5e5}
    config |= json.loads((layouts.LLAVA_FOLDER / "config.json").read_text())["text_config"]
    assert max(errors(tmp_path, gguf(tmp_path, config), "fp32")) < 1e-5


@pytest.mark.parametrize("scheme", ["fp8", "bf16"])
def test_comfy_fp8_file(scheme: str, tmp_path: Path) -> None:
    """Copied as it is, or dequantized: as good as 2.65 % of error in each weight lets it be, and equally good."""
    rows, pooled = errors(tmp_path, pieces(tmp_path, torch.float16, fp8=True), scheme)
    assert 1e-3 < rows < 0.06
    assert pooled < 1e-3
