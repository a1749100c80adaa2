"""ComfyUI's models folder: pieces are found by content, choices and gaps are told all at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import encoder_layouts as layouts
import pytest
import torch
from PIL import Image

from goldens import golden, names, transformer_weights
from lowvram_i2v import cli
from lowvram_i2v.checkpoint import COMPONENTS, open_model
from lowvram_i2v.convert.shapes import clip_shapes, llava_shapes, vae_shapes
from lowvram_i2v.convert.sources import Hints, comfy_set, open_source
from lowvram_i2v.convert.sources.comfy_set import open_comfy
from lowvram_i2v.convert.sources.pieces import Pieces, open_pieces
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.synth.sizes import SIZES, llava_json
from lowvram_i2v.vae.config import VaeConfig

TEXT = "text_encoders"
I2V = "hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors"


@pytest.fixture(scope="module")
def transformer() -> layouts.Tensors:
    return transformer_weights(golden(names("A_transformer")[0]).info)


@pytest.fixture(scope="module")
def comfy_once(tmp_path_factory: pytest.TempPathFactory, transformer: layouts.Tensors) -> Path:
    """The set of the guide, among other models, in a ComfyUI folder that has its own tokenizers."""
    models, llava = tmp_path_factory.mktemp("comfy") / "ComfyUI" / "models", layouts.llava()
    layouts.save(layouts.in_dtype(transformer, torch.bfloat16), models / "diffusion_models" / I2V)
    half = layouts.in_dtype(llava, torch.float16)
    layouts.save(layouts.comfy_language(half, fp8=True), models / TEXT / "llava_llama3_fp8_scaled.safetensors")
    layouts.save(layouts.in_dtype(layouts.clip(), torch.float16), models / TEXT / "clip_l.safetensors")
    layouts.save(layouts.vision(half), models / "clip_vision" / "llava_llama3_vision.safetensors")
    layouts.save(layouts.vae(), models / "vae" / "hunyuan_video_vae_bf16.safetensors")
    config = golden(names("E_vae_plain")[0]).info["config"]
    (models / "vae" / "config.json").write_text(json.dumps(config))
    others(models)
    program = models.parent / "comfy"
    shutil.copytree(layouts.LLAVA_FOLDER, program / "text_encoders" / "llama_tokenizer")
    shutil.copytree(layouts.CLIP_FOLDER, program / "sd1_tokenizer")
    return models


@pytest.fixture
def comfy(comfy_once: Path, tmp_path: Path) -> Path:
    """One's own, whose files are links: to be moved and removed, not written to."""
    shutil.copytree(comfy_once.parent, tmp_path / "ComfyUI", copy_function=os.link)
    return tmp_path / "ComfyUI" / "models"


def others(models: Path) -> None:
    """What lies in such folders besides."""
    one = torch.zeros(1)
    layouts.save({"encoder.block.0.layer.0.SelfAttention.q.weight": one}, models / TEXT / "t5xxl_fp16.safetensors")
    wide = {"embeddings.token_embedding.weight": (9, 1280), "encoder.layers.0.self_attn.q_proj.weight": (1280, 1280)}
    layouts.save_hollow({f"text_model.{n}": s for n, s in wide.items()}, models / TEXT / "clip_g.safetensors", "F16")
    llama = {"model.embed_tokens.weight": (128256, 4096), "model.layers.0.post_attention_layernorm.weight": (4096,)}
    layouts.save_hollow(llama, models / TEXT / "llama_3.1_8b_instruct.safetensors", "F16")
    layouts.save({"vision_model.embeddings.class_embedding": one}, models / "clip_vision" / "clip_vision_h.safetensors")
    layouts.save({"img_in.weight": one}, models / "diffusion_models" / "flux1-dev.safetensors")
    layouts.save({"encoder.down.0.block.0.conv1.weight": one}, models / "vae" / "ae.safetensors")
    (models / "vae" / "put_vae_here").write_text("")
    (models / "vae" / "broken.safetensors").write_bytes(b"\0" * 3)


def rename(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def test_the_whole_set_is_found(comfy: Path, transformer: layouts.Tensors) -> None:
    found = open_source(comfy, COMPONENTS)
    assert {name: source.path.name for name, source in found.items()} == {
        "transformer": I2V,
        "text_encoder": "llava_llama3_fp8_scaled.safetensors",
        "text_encoder_2": "clip_l.safetensors",
        "vae": "hunyuan_video_vae_bf16.safetensors",
    }
    assert found["transformer"].variant == "token_replace"
    assert set(found["transformer"].tensors) == set(transformer)
    shapes = {name: {n: t.shape for n, t in source.tensors.items()} for name, source in found.items()}
    assert shapes["text_encoder"] == llava_shapes(found["text_encoder"].config)
    assert shapes["text_encoder_2"] == clip_shapes(found["text_encoder_2"].config)
    assert shapes["vae"] == vae_shapes(VaeConfig.from_official(found["vae"].config))
    assert found["text_encoder"].tokenizer[0].name == "tokenizer.json"
    assert {file.name for file in found["text_encoder_2"].tokenizer} >= {"vocab.json", "merges.txt"}


def test_one_command_makes_a_model_that_generates(comfy: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", "--from-comfy", str(comfy), str(tmp_path / "model"), "--device", "cpu"]) == 0
    model = open_model(tmp_path / "model")
    assert {name: record.scheme for name, record in model.header.records.items()} == {
        "transformer": "int8",
        "text_encoder": "fp8",
        "text_encoder_2": "bf16",
        "vae": "bf16",
    }
    Image.linear_gradient("L").save(tmp_path / "photo.png")
    flags = ["--image", str(tmp_path / "photo.png"), "--prompt", "It moves.", "--size", "64x48", "--frames", "5"]
    flags += ["--model", str(model.path), "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "out.mp4")]
    assert cli.main(["generate", *flags]) == 0
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_old_folder_names_and_folders_within(comfy: Path) -> None:
    rename(comfy / "diffusion_models", "unet")
    rename(comfy / TEXT, "clip")
    (comfy / "vae" / "hunyuan").mkdir()
    for name in ("hunyuan_video_vae_bf16.safetensors", "config.json"):
        (comfy / "vae" / name).rename(comfy / "vae" / "hunyuan" / name)
    assert set(open_source(comfy, COMPONENTS)) == set(COMPONENTS)


def test_linked_folders_are_looked_into(comfy: Path, tmp_path: Path) -> None:
    """Each once, also where links lead in a circle."""
    (comfy / "diffusion_models").rename(tmp_path / "elsewhere")
    (comfy / "diffusion_models").mkdir()
    (comfy / "diffusion_models" / "Hunyuan").symlink_to(tmp_path / "elsewhere")
    (comfy / "unet").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    found = open_comfy(comfy, ["transformer"])["transformer"].path
    assert found == comfy / "diffusion_models" / "Hunyuan" / I2V


def test_names_of_files_do_not_matter(comfy: Path) -> None:
    rename(comfy / TEXT / "llava_llama3_fp8_scaled.safetensors", "a.safetensors")
    rename(comfy / TEXT / "clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors")
    rename(comfy / "clip_vision" / "llava_llama3_vision.safetensors", "b.safetensors")
    found = open_comfy(comfy, ["text_encoder", "text_encoder_2"])
    assert found["text_encoder"].path.name == "a.safetensors"
    assert found["text_encoder_2"].path.name == "llava_llama3_fp8_scaled.safetensors"


def test_several_that_fit_are_listed_and_one_is_asked_for(comfy: Path) -> None:
    first = comfy / "diffusion_models" / I2V
    second = comfy / "diffusion_models" / "hunyuan_i2v_copy.safetensors"
    shutil.copyfile(first, second)
    shutil.copyfile(comfy / TEXT / "clip_l.safetensors", comfy / TEXT / "clip_l_2.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_source(comfy, COMPONENTS)
    for part in (I2V, second.name, "--transformer FILE", "clip_l_2", "--text-encoder-2 FILE", "GB, official names"):
        assert part in str(caught.value)
    given = Pieces(transformer=second, text_encoder_2=comfy / TEXT / "clip_l_2.safetensors")
    assert open_comfy(comfy, COMPONENTS, given)["transformer"].path == second


def test_text_to_video_is_no_candidate(comfy: Path) -> None:
    first = comfy / "diffusion_models" / I2V
    shutil.copyfile(first, comfy / "diffusion_models" / "hunyuan_video_t2v_720p_bf16.safetensors")
    assert open_comfy(comfy, ["transformer"])["transformer"].path == first
    first.unlink()
    with pytest.raises(CheckpointError, match=r"transformer(.|\n)*text-to-video"):
        open_comfy(comfy, ["transformer"])


def test_all_that_is_missing_is_listed_at_once(comfy: Path) -> None:
    shutil.rmtree(comfy.parent / "comfy")
    shutil.rmtree(comfy / "clip_vision")
    (comfy / "vae" / "hunyuan_video_vae_bf16.safetensors").unlink()
    (comfy / "diffusion_models" / I2V).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_source(comfy, COMPONENTS)
    parts = ("transformer of HunyuanVideo-I2V", "llava_llama3_vision", "VAE of HunyuanVideo", "broken.safetensors")
    parts += ("--tokenizer-2", "openai/clip-vit-large-patch14", "1 files in diffusion_models/ and unet/")
    for part in parts:
        assert part in str(caught.value), part


def test_near_misses_are_named(comfy: Path) -> None:
    (comfy / TEXT / "llava_llama3_fp8_scaled.safetensors").unlink()
    (comfy / TEXT / "clip_l.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_comfy(comfy, ["text_encoder", "text_encoder_2"])
    for part in ("llama_3.1_8b_instruct.safetensors is a LLaMA", "plain Llama 3", "clip_g.safetensors is CLIP-G"):
        assert part in str(caught.value)


def test_given_pieces_are_not_looked_for(comfy: Path, tmp_path: Path) -> None:
    """A whole LLaVA that the user names takes no vision tower from the folder, a language model alone does."""
    llava = {name: value + 1 for name, value in layouts.llava().items()}
    named = layouts.prefixed(llava, layouts.TO_HUGGING_FACE)
    path = layouts.save(named, tmp_path / "hf" / "model.safetensors")
    given = Pieces(text_encoder=path, tokenizer=layouts.LLAVA_FOLDER)
    found = open_comfy(comfy, ["text_encoder"], given)["text_encoder"]
    assert found.path == path
    assert all(torch.equal(found.tensors[name].read(), value) for name, value in llava.items())
    layouts.save(layouts.language(llava), path)
    found = open_comfy(comfy, ["text_encoder"], given)["text_encoder"]
    for name, value in layouts.llava().items():
        assert torch.equal(found.tensors[name].read().float(), value.half().float()) == name.startswith(layouts.VISION)
    shutil.rmtree(comfy / "clip_vision")
    with pytest.raises(CheckpointError, match="vision: LLaVA's vision tower"):
        open_comfy(comfy, ["text_encoder"], given)


def test_a_vision_tower_alone_is_refused(comfy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comfy / "clip_vision" / "llava_llama3_vision.safetensors"
    assert cli.main(["convert", str(path), str(tmp_path / "model"), "--device", "cpu"]) == 1
    assert "name that with --text-encoder" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_pieces_one_by_one(comfy: Path) -> None:
    pieces = Pieces(
        text_encoder=comfy / TEXT / "llava_llama3_fp8_scaled.safetensors",
        vision=comfy / "clip_vision" / "llava_llama3_vision.safetensors",
        text_encoder_2=comfy / TEXT / "clip_l.safetensors",
        tokenizer=layouts.LLAVA_FOLDER,
        tokenizer_2=layouts.CLIP_FOLDER / "vocab.json",
    )
    assert set(open_pieces(pieces, ["text_encoder", "text_encoder_2"])) == {"text_encoder", "text_encoder_2"}
    missing = Pieces(vae=comfy / "nothing", text_encoder_2=pieces.text_encoder_2)
    with pytest.raises(CheckpointError) as caught:
        open_pieces(missing, COMPONENTS)
    for part in ("transformer: not given", "text_encoder: not given", "does not exist", "--tokenizer-2"):
        assert part in str(caught.value), part


def test_an_empty_folder_and_other_layouts(tmp_path: Path) -> None:
    for name in ("vae", "transformer"):
        (tmp_path / name).mkdir()
    assert not comfy_set.matches(tmp_path)
    (tmp_path / "diffusion_models").mkdir()
    assert comfy_set.matches(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        comfy_set.open_components(tmp_path, COMPONENTS, Hints())
    for component in COMPONENTS:
        assert f"- {component}: " in str(caught.value)


def test_the_released_sizes_need_no_config(comfy: Path) -> None:
    """Full-size files, hollow ones: everything is inferred, and fits."""
    for folder in ("diffusion_models", TEXT, "clip_vision", "vae"):
        shutil.rmtree(comfy / folder)
    shapes = llava_shapes(llava_json(SIZES["full"], {"begin": 1, "end": 2, "image": 128257, "pad": 128258}))
    language = {name: shape for name, shape in shapes.items() if not name.startswith(layouts.VISION)}
    vision = {name: shape for name, shape in shapes.items() if name.startswith(layouts.VISION)}
    layouts.save_hollow(language, comfy / TEXT / "x.safetensors", "F16")
    layouts.save_hollow(vision, comfy / "clip_vision" / "y.safetensors", "F16")
    layouts.save_hollow(clip_shapes(SIZES["full"].clip), comfy / TEXT / "z.safetensors", "F16")
    layouts.save_hollow(vae_shapes(VaeConfig()), comfy / "vae" / "v.safetensors")
    for folder in ("text_encoders/llama_tokenizer", "sd1_tokenizer"):
        (comfy.parent / "comfy" / folder / "config.json").unlink()  # ComfyUI has none
    found = open_comfy(comfy, ["text_encoder", "text_encoder_2", "vae"])
    assert {name: t.shape for name, t in found["text_encoder"].tensors.items()} == shapes
    assert llava_shapes(found["text_encoder"].config) == shapes
    assert clip_shapes(found["text_encoder_2"].config) == clip_shapes(SIZES["full"].clip)
    assert VaeConfig.from_official(found["vae"].config) == VaeConfig()
