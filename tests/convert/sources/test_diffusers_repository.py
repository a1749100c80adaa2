"""A whole diffusers repository, all six folders of it, is read as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TRANSFORMER, VAE, Made
from transformer_layouts import as_diffusers, write_shards

from lowvram_i2v.checkpoint import COMPONENTS, component_file, open_model
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.inspect import inspect

ENCODERS = {"text_encoder_i2v": ("text_encoder", "tokenizer"), "text_encoder_2": ("text_encoder_2", "tokenizer_2")}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def as_repository(tree: Path, folder: Path) -> Path:
    """The released tree as `save_pretrained` of the pipeline writes it."""
    write_shards(as_diffusers(torch.load(tree / TRANSFORMER, weights_only=True)["module"]), folder / "transformer")
    config = {"_class_name": "HunyuanVideoTransformer3DModel", "image_condition_type": "token_replace"}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "vae").mkdir()
    save_file(torch.load(tree / VAE, weights_only=True), folder / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copy(tree / "hunyuan-video-i2v-720p" / "vae" / "config.json", folder / "vae")
    for source, (weights, tokenizer) in ENCODERS.items():
        for name in (weights, tokenizer):
            (folder / name).mkdir()
        for file in (tree / source).iterdir():
            shutil.copy(file, folder / (tokenizer if file.name in TOKENIZER else weights))
    (folder / "model_index.json").write_text('{"_class_name": "HunyuanVideoImageToVideoPipeline"}')
    return folder


def test_a_whole_repository(released_once: Made, model_once: Made, tmp_path: Path) -> None:
    source = as_repository(released_once("token_replace"), tmp_path / "repository")
    assert f"{source}: a diffusers repository" in list(inspect(source))
    convert(source, tmp_path / "model", "bf16")
    made, expected = open_model(tmp_path / "model"), model_once("token_replace", "bf16")
    assert made.header.variant.name == "token_replace"
    for component in COMPONENTS:
        ours, theirs = (load_file(folder / component_file(component)) for folder in (made.path, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), component
    for name in ("tokenizer", "tokenizer_2"):
        assert {file.name for file in (made.path / name).iterdir()} <= set(TOKENIZER)
    (source / "model_index.json").unlink()  # by the transformer's config.json alone
    assert f"{source}: a diffusers repository" in list(inspect(source))
