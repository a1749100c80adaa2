"""What `inspect` says of a file: every layout told apart from its header, every other model refused by name."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformer_layouts import (
    CONCAT,
    State,
    as_comfy,
    as_diffusers,
    comfy_metadata,
    fp8_scaled,
    int8_rows,
    official_state,
    plain_fp8,
    prefixed,
    quantized_layers,
    tables,
    with_comfy_quant,
    write,
    write_shards,
)

from lowvram_i2v.convert.detect import Detected, detect, detect_folder
from lowvram_i2v.convert.sources import Hints, open_component
from lowvram_i2v.errors import CheckpointError

FP8_NEW = {"format": "float8_e4m3fn"}


def quanto_names(state: State) -> State:
    tensors, _ = int8_rows(state)
    renamed = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        if tensor.dtype == torch.int8:
            renamed[f"{name}._data"] = tensor
        else:
            renamed[f"{layer}.weight._scale" if name.endswith("weight_scale") else name] = tensor
    return renamed


LAYOUTS: dict[str, tuple[Callable[[State], State], str, str]] = {
    "official": (dict, "official names", "none"),
    "kijai": (lambda s: plain_fp8(s)[0], "official names", "fp8 cast without scales"),
    "comfy": (as_comfy, "ComfyUI names", "none"),
    "comfy old norms": (lambda s: as_comfy(s, "official_to_comfy_old"), "ComfyUI names", "none"),
    "comfy t2v prefix": (
        lambda s: prefixed(as_comfy(s), "model.model."),
        "ComfyUI names, prefix model.model.",
        "none",
    ),
    "comfy fp8 legacy": (
        lambda s: fp8_scaled(s, "scale_weight", marker=True)[0],
        "official names",
        "ComfyUI fp8 scaled (before 0.4)",
    ),
    "comfy fp8": (
        lambda s: with_comfy_quant(fp8_scaled(s, "weight_scale")[0], quantized_layers(s), FP8_NEW),
        "official names",
        "ComfyUI fp8 (0.4 and later)",
    ),
    "comfy int8": (
        lambda s: with_comfy_quant(int8_rows(s)[0], quantized_layers(s), {"format": "int8_tensorwise"}),
        "official names",
        "ComfyUI int8 (0.4 and later)",
    ),
    "musubi": (lambda s: fp8_scaled(s, "scale_weight", "block")[0], "official names", "musubi-tuner fp8 scaled"),
    "lightx2v int8": (lambda s: int8_rows(s)[0], "official names", "LightX2V int8"),
    "lightx2v fp8": (lambda s: fp8_scaled(s, "weight_scale", "row")[0], "official names", "LightX2V fp8"),
    "kijai scaled": (lambda s: fp8_scaled(s, "fp8_scale", "one")[0], "official names", "Kijai fp8 with scales"),
    "quanto": (quanto_names, "official names", "quanto int8"),
    "diffusers": (as_diffusers, "diffusers names", "none"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_apart(layout: str, tmp_path: Path) -> None:
    make, names, quantization = LAYOUTS[layout]
    tensors = make(official_state())
    path = write(tensors, tmp_path / "x_i2v.safetensors")
    found = detect(path)
    assert (found.component, found.layout, found.quantization) == ("transformer", names, quantization)
    assert (found.variant, found.refusal, found.problems) == ("token_replace", None, ())
    assert (found.container, found.tensors, found.bytes) == ("safetensors", len(tensors), path.stat().st_size)
    assert sum((found.dtypes or {}).values()) == len(tensors)
    assert ("without scales" in " ".join(found.notices)) == (layout == "kijai")


def test_metadata_of_the_newer_comfy(tmp_path: Path) -> None:
    tensors, _ = fp8_scaled(official_state(), "weight_scale")
    layers = quantized_layers(official_state())
    found = detect(write(tensors, tmp_path / "x.safetensors", comfy_metadata(layers, FP8_NEW)))
    assert found.quantization == "ComfyUI fp8 (0.4 and later)"


def test_pickles_and_folders(tmp_path: Path) -> None:
    torch.save({"module": official_state(CONCAT)}, tmp_path / "mp_rank_00_model_states.pt")
    found = detect(tmp_path / "mp_rank_00_model_states.pt")
    assert (found.container, found.variant, found.layout) == ("torch pickle", "latent_concat", "official names")
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    split = as_diffusers(official_state(CONCAT))
    count = len(split)
    write_shards(split, tmp_path / "transformer")
    write({"a.lora_A.weight": torch.zeros(2)}, tmp_path / "loras" / "x.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    model, broken, lora = sorted(detect_folder(tmp_path), key=lambda one: (one.component or "x", str(one.path)))
    assert (model.component, model.tensors, model.variant) == ("transformer", count, "latent_concat")
    assert "cut off inside its header" in str(broken.refusal)
    assert "a LoRA" in str(lora.refusal)


def refused(path: Path) -> str:
    """The reason; opening gives it too."""
    found = detect(path)
    assert found.refusal
    with pytest.raises(CheckpointError) as caught:
        open_component(path, "transformer")
    assert str(path) in str(caught.value)
    return found.refusal


FRAMEPACK_EXTRA = ("image_projection.up", "image_projection.down", "clean_x_embedder.proj", "clean_x_embedder.proj_2x")
SPLIT = ("img_attn_q", "img_attn_k", "img_attn_v")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("relative", ["FramePack", "1.5", "1.5 in diffusers", "Wan2GP", "SkyReels", "17 channels"])
def test_relatives_are_refused_by_name(relative: str, prefix: str, tmp_path: Path) -> None:
    state = dict(official_state())
    words = f"{relative}"
    if relative == "FramePack":
        state = as_diffusers(state) | {f"{name}.weight": torch.zeros(4) for name in FRAMEPACK_EXTRA}
    elif relative == "1.5":
        state |= {"byt5_in.fc1.weight": torch.zeros(2), "vision_in.proj.0.weight": torch.zeros(2)}
        words = "HunyuanVideo-1.5"
    elif relative == "1.5 in diffusers":
        state = as_diffusers(state) | {"context_embedder_2.linear_1.weight": torch.zeros(2)}
        words = "HunyuanVideo-1.5"
    elif relative == "Wan2GP":
        for name in [name for name in state if "img_attn_qkv" in name]:
            for part, rows in zip(SPLIT, state.pop(name).chunk(3), strict=True):
                state[name.replace("img_attn_qkv", part)] = rows
    else:
        channels = 32 if relative == "SkyReels" else 17
        state["img_in.proj.weight"] = torch.zeros(128, channels, 1, 2, 2)
        words = "SkyReels" if channels == 32 else "it takes 17 input channels, not 16"
    assert words in refused(write(prefixed(state, prefix), tmp_path / "i2v.safetensors"))


OTHERS = {
    "Flux": ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "Wan": ["patch_embedding.weight", "blocks.0.self_attn.q.weight"],
    "LTX": ["patchify_proj.weight", "transformer_blocks.0.scale_shift_table"],
    "Stable Diffusion U-Net": ["input_blocks.0.0.weight", "out.2.weight"],
    "Stable Diffusion 3": ["joint_blocks.0.x_block.attn.qkv.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "LoRA": ["Hunyuan_video_I2V_lora_double_blocks_0_img_attn_proj.lora_down.weight"],
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("model", OTHERS)
def test_other_models_are_named(model: str, prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: torch.zeros(2, 2) for name in OTHERS[model]}
    assert model in refused(write(tensors, tmp_path / "i2v.safetensors"))


def test_unknown_models_show_their_names(tmp_path: Path) -> None:
    reason = refused(write({"one.weight": torch.zeros(2), "two.bias": torch.zeros(2)}, tmp_path / "x.safetensors"))
    assert "its 2 tensors are called one.weight, two.bias" in reason


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("hunyuan_video_I2V_720_fixed_fp8_e4m3fn.safetensors", "token_replace"),
        ("hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors", "token_replace"),
        ("HunyuanVideo-I2V/transformer/model.safetensors", "token_replace"),
        ("hunyuan-video-i2v-720p/transformers/model.safetensors", "token_replace"),
        ("hunyuan_video_t2v_720p_bf16.safetensors", "text"),
        ("hunyuan-video-t2v-720p/transformers/model.safetensors", "text"),
        ("t2v_models/hunyuan_i2v.safetensors", "token_replace"),
        ("hunyuan_video_720_cfgdistill_bf16.safetensors", None),
        ("lowvram-i2v/weights/model.safetensors", None),
        ("lowvram_i2v/weights/model.safetensors", None),
    ],
)
def test_names_tell_text_from_image_where_nothing_else_can(name: str, variant: str | None, tmp_path: Path) -> None:
    path = write(official_state(), tmp_path / "a" / "b" / name)
    assert open_component(path, "transformer", Hints("token_replace")).variant == "token_replace"
    if variant == "text":
        assert "is the text-to-video model" in refused(path)
        assert detect(path, "token_replace").refusal is None
        return
    assert detect(path).variant == open_component(path, "transformer").variant == variant


def test_our_own_metadata_tells_the_variant(tmp_path: Path) -> None:
    for text, variant in (('{"variant": "token_replace"}', "token_replace"), ('{"variant": 3}', None), ("[", None)):
        path = write(official_state(), tmp_path / "x.safetensors", {"lowvram_i2v": text})
        assert detect(path).variant == variant


@pytest.mark.parametrize("condition", ["token_replace", None])
def test_diffusers_config_tells_text_from_image(condition: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "HunyuanVideo" / "transformer"
    write(as_diffusers(official_state()), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "HunyuanVideoTransformer3DModel", "image_condition_type": condition}
    (folder / "config.json").write_text(json.dumps(config))
    found = detect(folder)
    assert found.variant == condition
    assert ("text-to-video" in str(found.refusal)) == (condition is None)


def test_what_does_not_fit_the_model_is_listed(tmp_path: Path) -> None:
    state = dict(official_state())
    del state["double_blocks.1.img_mlp.fc2.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["single_blocks.0.linear1.weight"] = state["single_blocks.0.linear1.weight"][:-1]
    problems = "\n".join(detect(write(state, tmp_path / "i2v.safetensors")).problems)
    for words in ("missing: double_blocks.1.img_mlp.fc2.bias", "wrong shape: single_blocks.0", "extra.weight"):
        assert words in problems


def test_thousands_of_foreign_names_take_no_long(tmp_path: Path) -> None:
    """Each is told once, and the time is in proportion to their number: 0.5 s, not 7."""
    foreign = {f"double_blocks.0.other{number}.weight": torch.zeros(0) for number in range(8000)}
    path = write(official_state() | foreign, tmp_path / "i2v.safetensors")
    start = time.process_time()
    problems = detect(path).problems
    assert time.process_time() - start < 3
    assert len(problems) == len(foreign)


def test_tensors_outside_the_prefix_are_noticed(tmp_path: Path) -> None:
    state = prefixed(official_state(), "model.diffusion_model.") | {"first_stage_model.conv.weight": torch.zeros(2)}
    path = write(state, tmp_path / "i2v.safetensors")
    found = detect(path)
    assert found.problems == ()
    assert "1 tensors outside model.diffusion_model.*" in found.notices[0]
    source = open_component(path, "transformer")
    assert set(source.tensors) == set(official_state())
    assert "first_stage_model.conv.weight" in source.notices[0]


def test_the_real_size_is_opened_from_its_header_alone(tmp_path: Path) -> None:
    """A sparse file of 25.6 GB."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in tables()["official"].items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "hunyuan_i2v.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    assert end == 2 * 12_821_012_544
    found: Detected = detect(path)
    assert (found.problems, found.variant, found.tensors) == ((), "token_replace", 856)
    assert not open_component(path, "transformer").tensors["img_in.proj.weight"].read().any()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"GGUF", b"PK\x03\x04", b"\x80\x02.", b"\0" * 100, b"{}", b"<html>" * 9]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", ".index.json"])
def test_garbage_is_an_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"i2v{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        detect(path)
    assert all(one.refusal for one in detect_folder(tmp_path))


def test_an_index_that_names_itself_or_others(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in (index.name, "../x.safetensors", "/etc/passwd", "a\0b", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="weight_map"):
            detect(index)


def test_a_folder_with_several_sets_asks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"holds several sets of weights: a\.safetensors, b\.safetensors"):
        detect(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_component(tmp_path / "no", "transformer")
