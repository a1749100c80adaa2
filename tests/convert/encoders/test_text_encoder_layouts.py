"""Each layout of the text encoder, written as its owners write it, gives the same tensors under our names."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_layouts as layouts
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from lowvram_i2v.convert.policy import layout
from lowvram_i2v.convert.shapes import llava_shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints, open_component
from lowvram_i2v.convert.sources.text_encoder import detect_text_encoder, open_text_encoder, our_llava_name
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.synth.sizes import SIZES, llava_json
from lowvram_i2v.text.template import IMAGE
from lowvram_i2v.text.tokenizers import LlavaTokenizer

CONFIG = json.loads((layouts.LLAVA_FOLDER / "config.json").read_text())
LLAMA = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, **CONFIG["text_config"]}
HINTS = Hints(tokenizer=layouts.LLAVA_FOLDER)


@pytest.fixture(scope="module")
def tensors() -> layouts.Tensors:
    return layouts.llava()


def side_files(folder: Path) -> Path:
    """config.json and tokenizer beside the weights, as in a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(layouts.LLAVA_FOLDER / name, folder / name)
    return folder


def vision_file(tensors: layouts.Tensors, folder: Path) -> Path:
    return layouts.save(layouts.vision(tensors), folder / "llava_llama3_vision.safetensors")


def assert_equal(source: ComponentSource, expected: dict[str, Tensor]) -> None:
    assert source.tensors.keys() == expected.keys()
    for name, value in expected.items():
        read = source.tensors[name].read()
        assert (tuple(read.shape), read.dtype) == (source.tensors[name].shape, source.tensors[name].dtype), name
        assert torch.equal(read.float(), value.float()), name


def assert_whole(source: ComponentSource) -> None:
    """It fits its own config, and comes with a tokenizer that encodes."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    assert shapes == llava_shapes(source.config)
    assert source.tokenizer[0].name == "tokenizer.json"


Write = Callable[[layouts.Tensors, Path], None]


def hugging_face(tensors: layouts.Tensors, folder: Path) -> None:
    named = layouts.prefixed(tensors, layouts.TO_HUGGING_FACE)
    layouts.save(named | {"language_model.lm_head.weight": torch.zeros(3)}, folder / "model.safetensors")


def sharded(tensors: layouts.Tensors, folder: Path) -> None:
    named = layouts.prefixed(tensors, layouts.TO_HUGGING_FACE)
    half = len(named) // 2
    parts = {"a": dict(list(named.items())[:half]), "b": dict(list(named.items())[half:])}
    for part, values in parts.items():
        layouts.save(values, folder / f"model-{part}.safetensors")
    weight_map = {name: f"model-{part}.safetensors" for part, values in parts.items() for name in values}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def transformers_5(tensors: layouts.Tensors, folder: Path) -> None:
    named = layouts.prefixed(tensors, layouts.TO_TRANSFORMERS_5)
    layouts.save(named | {"lm_head.weight": torch.zeros(3)}, folder / "model.safetensors")


def pickled(tensors: layouts.Tensors, folder: Path) -> None:
    torch.save(layouts.prefixed(tensors, layouts.TO_HUGGING_FACE), folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [hugging_face, sharded, transformers_5, pickled])
def test_a_folder_with_everything(write: Write, tensors: layouts.Tensors, tmp_path: Path) -> None:
    write(tensors, side_files(tmp_path))
    source = open_component(tmp_path, "text_encoder")
    assert_equal(source, tensors)
    assert_whole(source)
    assert source.config == CONFIG
    assert [file.name for file in source.tokenizer] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    assert source.bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) or write is pickled


def test_the_library_s_own_names_are_the_ones_read() -> None:
    """transformers is the judge of how its model is called in memory."""
    from accelerate import init_empty_weights
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with init_empty_weights():
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(CONFIG)))
    shapes = {ours: tuple(value.shape) for name, value in model.state_dict().items() if (ours := our_llava_name(name))}
    assert shapes == llava_shapes(CONFIG)
    match = detect_text_encoder({name: tuple(v.shape) for name, v in model.state_dict().items()}, {})
    assert match is not None
    assert (match.layout, match.lacks, match.refusal) == ("LLaVA in transformers 5's names", (), None)


def test_all_names_of_the_released_model() -> None:
    config = llava_json(SIZES["full"], {"begin": 128000, "end": 128001, "image": 128257, "pad": 128258})
    shapes = llava_shapes(config)
    for prefixes in (layouts.TO_HUGGING_FACE, layouts.TO_TRANSFORMERS_5, {}):
        named = layouts.prefixed(shapes, prefixes) if prefixes else shapes  # type: ignore[type-var]
        assert {our_llava_name(name): shape for name, shape in named.items()} == shapes
        match = detect_text_encoder(named, {})
        assert match is not None
        assert match.refusal is None
    assert len(layouts.prefixed(shapes, layouts.TO_HUGGING_FACE)) + 1 == 686  # type: ignore[type-var]
    gguf = {layouts.gguf_name(name): shape for name, shape in shapes.items() if not name.startswith(layouts.VISION)}
    assert {our_llava_name(name) for name in gguf} == {n for n in shapes if not n.startswith(layouts.VISION)}
    match = detect_text_encoder(gguf, {"general.architecture": "llama"})
    assert match is not None
    assert (match.refusal, match.lacks) == (None, ("vision tower",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comfy_files_without_quantization(dtype: torch.dtype, tensors: layouts.Tensors, tmp_path: Path) -> None:
    stored = layouts.in_dtype(tensors, dtype)
    path = layouts.save(layouts.comfy_language(stored), tmp_path / "llava_llama3_fp16.safetensors")
    source = open_text_encoder(path, HINTS, vision_file(stored, tmp_path))
    assert_equal(source, stored)
    assert_whole(source)
    assert all(tensor.dtype == dtype for tensor in source.tensors.values())


def test_comfy_fp8_scaled_has_the_scaled_values_and_keeps_the_codes(tensors: layouts.Tensors, tmp_path: Path) -> None:
    half = layouts.in_dtype(tensors, torch.float16)
    stored = layouts.comfy_language(half, fp8=True)
    path = layouts.save(stored, tmp_path / "llava_llama3_fp8_scaled.safetensors")
    source = open_text_encoder(path, Hints(config=layouts.LLAVA_FOLDER), vision_file(half, tmp_path))
    expected = dict(half)
    layers = [name.removesuffix(".scale_weight") for name in stored if name.endswith(".scale_weight")]
    assert len(layers) == 7 * CONFIG["text_config"]["num_hidden_layers"]
    for layer in layers:
        expected[f"{layer}.weight"] = stored[f"{layer}.weight"].float() * stored[f"{layer}.scale_weight"]
    assert_equal(source, expected)
    assert_whole(source)
    assert [file.read_bytes() for file in source.tokenizer] == [(layouts.LLAVA_FOLDER / "tokenizer.json").read_bytes()]
    again = {name: job for job in layout("text_encoder", "fp8", source.tensors).jobs for name in job.names}
    for layer in layers:
        for suffix in ("weight", "scale_weight"):
            name = f"{layer}.{suffix}"
            copied = again[name].produce()[name]
            assert torch.equal(copied.reshape(-1).view(torch.uint8), stored[name].reshape(-1).view(torch.uint8)), name


def test_the_vision_tower_of_another_llava(tensors: layouts.Tensors, tmp_path: Path) -> None:
    """The language model stays."""
    other = {name: value + 1 for name, value in tensors.items()}
    path = layouts.save(layouts.prefixed(tensors, layouts.TO_HUGGING_FACE), tmp_path / "x.safetensors")
    vision = layouts.save(layouts.prefixed(other, layouts.TO_HUGGING_FACE), tmp_path / "y.safetensors")
    assert_equal(open_text_encoder(path, HINTS, vision), layouts.language(tensors) | layouts.vision(other))


def test_quanto_rows(tensors: layouts.Tensors, tmp_path: Path) -> None:
    stored = layouts.quanto(tensors)
    metadata = {
        "quantization_format": "quanto",
        "config_base64": base64.b64encode(json.dumps(CONFIG).encode()).decode(),
    }
    path = layouts.save(stored, tmp_path / "llava-llama-3-8b-v1_1_vlm_quanto_int8.safetensors", metadata)
    (tmp_path / "tok").mkdir()
    shutil.copyfile(layouts.LLAVA_FOLDER / "tokenizer.json", tmp_path / "tok" / "tokenizer.json")
    source = open_component(path, "text_encoder", Hints(tokenizer=tmp_path / "tok"))
    expected = dict(tensors)
    for name in [name for name in expected if re.fullmatch(layouts.QUANTIZED, name)]:
        released = name.replace("model.", "language_model.model.", 1)
        expected[name] = stored[f"{released}._data"].float() * stored[f"{released}._scale"].float()
    assert_equal(source, expected)
    assert source.config == CONFIG


def test_a_plain_cast_is_read_with_a_warning(tensors: layouts.Tensors, tmp_path: Path) -> None:
    cast = {
        name: value.to(torch.float8_e4m3fn) if re.fullmatch(layouts.QUANTIZED, name) else value
        for name, value in tensors.items()
    }
    path = layouts.save(layouts.comfy_language(cast), tmp_path / "x.safetensors")
    source = open_text_encoder(path, HINTS, vision_file(tensors, tmp_path))
    assert_equal(source, cast)
    assert any("fp8" in notice for notice in source.notices)


@pytest.mark.parametrize("type_", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0])
def test_gguf_rows_are_put_back(type_: GGMLQuantizationType, tensors: layouts.Tensors, tmp_path: Path) -> None:
    path = layouts.save_gguf(tensors, LLAMA, tmp_path / "llava.gguf", type_)
    source = open_text_encoder(path, Hints(config=layouts.LLAVA_FOLDER), vision_file(tensors, tmp_path))
    expected = dict(tensors)
    for name, value in layouts.language(tensors).items():
        if value.dim() == 2:
            coded = quants.quantize(value.float().numpy(), type_)
            expected[name] = torch.from_numpy(quants.dequantize(coded, type_).copy()).reshape(value.shape)
    assert_equal(source, expected)
    assert_whole(source)


def with_vision_of(tensors: layouts.Tensors, width: int) -> layouts.Tensors:
    """Another vision tower. Nothing but shapes counts here."""
    vision = CONFIG["vision_config"] | {"hidden_size": width}
    shapes = llava_shapes(CONFIG | {"vision_config": vision})
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(layouts.VISION)}
    return layouts.language(tensors) | zeros


def test_gguf_brings_heads_and_tokenizer(tensors: layouts.Tensors, tmp_path: Path) -> None:
    """Of a vision tower whose heads are not the released ones, the number of heads must be given."""
    path = layouts.save_gguf(tensors, LLAMA, tmp_path / "llava.gguf")
    with pytest.raises(CheckpointError, match=r"vision tower 40 wide(.|\n)*config\.json"):
        open_text_encoder(path, Hints(), vision_file(with_vision_of(tensors, 40), tmp_path))
    source = open_text_encoder(path, Hints(), vision_file(with_vision_of(tensors, 128), tmp_path))
    assert_whole(source)
    text = source.config["text_config"]
    for key in ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"):
        assert text[key] == LLAMA[key], key
    assert source.config["vision_config"]["num_attention_heads"] == 2
    assert source.config["image_token_index"] == CONFIG["image_token_index"]
    (tokenizer,) = source.tokenizer
    made, original = (
        json.loads(tokenizer.read_bytes()),
        json.loads((layouts.LLAVA_FOLDER / "tokenizer.json").read_text()),
    )
    assert made["model"]["ignore_merges"] is True  # as Llama 3's own
    special = {token["content"]: token["id"] for token in original["added_tokens"]}
    assert made["model"]["vocab"] == original["model"]["vocab"] | special  # without the file's unused tokens


def test_configs_of_bare_files_are_the_released_ones() -> None:
    """From the shapes of the full model alone."""
    from lowvram_i2v.convert.sources.encoder_configs import llava_config

    ids = {"begin": 128000, "end": 128001, "image": 128257, "pad": 128258}
    released = llava_json(SIZES["full"], ids)
    made = llava_config(llava_shapes(released), {IMAGE: 128257, "<pad>": 128258}, {}, Path("x"))
    from transformers import LlavaConfig

    theirs, ours = LlavaConfig.from_dict(released).to_dict(), LlavaConfig.from_dict(made).to_dict()
    for part in ("text_config", "vision_config"):
        for drop in ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "architectures", "pad_token_id"):
            theirs[part].pop(drop, None)
            ours[part].pop(drop, None)
        assert ours[part] == theirs[part]
    for key in ("image_token_index", "image_token_id", "vision_feature_layer", "vision_feature_select_strategy"):
        assert ours.get(key) == theirs.get(key)
    assert llava_shapes(made) == llava_shapes(released)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_language_model_alone_lists_all_that_is_missing(
    prefix: str, tensors: layouts.Tensors, tmp_path: Path
) -> None:
    """Kijai's repository and hunyuanvideo-community's: `model.` and no prefix."""
    named = layouts.prefixed(layouts.language(tensors), {"model.": prefix})
    layouts.save(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama"}))
    with pytest.raises(CheckpointError) as caught:
        open_component(tmp_path, "text_encoder")
    for part in ("vision tower", "llava_llama3_vision", "--vision", "tokenizer.json", "--tokenizer"):
        assert part in str(caught.value)
    assert "language model" not in str(caught.value)
    shutil.copyfile(layouts.LLAVA_FOLDER / "tokenizer.json", tmp_path / "tokenizer.json")
    other = with_vision_of(tensors, 64)
    source = open_text_encoder(tmp_path, Hints(), vision_file(other, tmp_path / "v"))
    assert_equal(source, other)
    assert source.config["text_config"]["num_attention_heads"] == LLAMA["num_attention_heads"]  # of its config.json
    hints = Hints(config=layouts.LLAVA_FOLDER / "config.json")
    assert_equal(open_text_encoder(tmp_path, hints, vision_file(tensors, tmp_path / "w")), tensors)


def test_a_vision_tower_alone_is_not_enough(tensors: layouts.Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"language model: give llava_llama3(.|\n)*tokenizer"):
        open_component(vision_file(tensors, tmp_path), "text_encoder")


def test_other_models_are_named(tensors: layouts.Tensors, tmp_path: Path) -> None:
    def refused(named: layouts.Tensors, *parts: str) -> None:
        path = layouts.save(named, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError) as caught:
            open_component(path, "text_encoder", HINTS)
        for part in parts:
            assert part in str(caught.value)

    text = layouts.comfy_language(tensors)
    refused(text | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, "another family")
    refused({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}, "is not LLaVA", "1 tensors")
    refused(layouts.clip(), "is not LLaVA")
    refused(
        text | layouts.vision(tensors) | {"model.extra": torch.zeros(3), "visual.blocks": torch.zeros(1)},
        "visual.blocks",
    )


@pytest.mark.parametrize(("rows", "word"), [(128256, "plain Llama 3"), (131072, "131072"), (128320, "")])
def test_llamas_of_full_size_are_told_apart(rows: int, word: str) -> None:
    shapes = {"model.embed_tokens.weight": (rows, 4096), "model.layers.0.post_attention_layernorm.weight": (4096,)}
    match = detect_text_encoder(shapes, {})
    assert match is not None
    assert (match.refusal is None) == (not word)
    assert word in (match.refusal or "")


def test_a_tokenizer_of_another_model_is_refused(tensors: layouts.Tensors, tmp_path: Path) -> None:
    path = layouts.save(layouts.comfy_language(tensors, tokenizer=False), tmp_path / "x.safetensors")
    vision = vision_file(tensors, tmp_path)
    folder = tmp_path / "tok"
    folder.mkdir()
    values: dict[str, Any] = json.loads((layouts.LLAVA_FOLDER / "tokenizer.json").read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no token <image>"):
        open_text_encoder(path, Hints(tokenizer=folder, config=layouts.LLAVA_FOLDER), vision)
    for damaged in ("{", "[]", '{"model": 3, "added_tokens": []}'):
        (folder / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            open_text_encoder(path, Hints(tokenizer=folder, config=layouts.LLAVA_FOLDER), vision)
    shutil.copyfile(layouts.LLAVA_FOLDER / "tokenizer.json", folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"image_token_index": 7}))
    with pytest.raises(CheckpointError, match="id 7"):
        open_text_encoder(path, Hints(tokenizer=folder), vision)


@pytest.mark.parametrize(("architecture", "split"), [("llama", "qwen2"), ("qwen2", "llama-bpe")])
def test_gguf_of_other_models_is_refused(
    architecture: str, split: str, tensors: layouts.Tensors, tmp_path: Path
) -> None:
    path = layouts.save_gguf(tensors, LLAMA, tmp_path / "x.gguf", architecture=architecture, split=split)
    with pytest.raises(CheckpointError, match="is not L"):
        open_text_encoder(path, Hints(config=layouts.LLAVA_FOLDER), vision_file(tensors, tmp_path))


def test_a_gguf_vocabulary_encodes_as_the_tokenizer_it_was_made_from(tensors: layouts.Tensors, tmp_path: Path) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    path = layouts.save_gguf(tensors, LLAMA, tmp_path / "llava.gguf")
    source = open_text_encoder(path, Hints(config=layouts.LLAVA_FOLDER), vision_file(tensors, tmp_path))
    (file,) = source.tokenizer
    (tmp_path / file.name).write_bytes(file.read_bytes())
    made, original = LlavaTokenizer(tmp_path), LlavaTokenizer(layouts.LLAVA_FOLDER)
    cases = layouts.golden(layouts.names("F_text")[0]).info["cases"]
    for case in cases.values():
        assert made.encode(case["prompt"]) == original.encode(case["prompt"])

    @settings(max_examples=200)
    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
    def equal(prompt: str) -> None:
        assert made.encode(prompt) == original.encode(prompt)

    equal()


def test_two_names_of_one_tensor_are_an_error(tensors: layouts.Tensors, tmp_path: Path) -> None:
    named = tensors | {"embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}
    path = layouts.save(named, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"twice: model\.embed_tokens\.weight"):
        open_component(path, "text_encoder", HINTS)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tensors: layouts.Tensors, tmp_path: Path) -> None:
    rows = CONFIG["image_token_index"]
    named = tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:rows]}
    path = layouts.save(named, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"{rows} embeddings.*<image> \({rows}\)"):
        open_component(path, "text_encoder", HINTS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_a_tokenizer_stored_oddly(dtype: torch.dtype, tensors: layouts.Tensors, tmp_path: Path) -> None:
    """Its bytes count, not what their dtype says."""
    data = layouts.blob()
    data = torch.cat([data, torch.full((-len(data) % 4,), ord(" "), dtype=torch.uint8)]).view(dtype)
    path = layouts.save({**tensors, "tokenizer": data}, tmp_path / "x.safetensors")
    source = open_component(path, "text_encoder", Hints(config=layouts.LLAVA_FOLDER))
    assert source.tokenizer[0].read_bytes().rstrip() == (layouts.LLAVA_FOLDER / "tokenizer.json").read_bytes().rstrip()
