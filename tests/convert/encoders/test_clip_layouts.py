"""CLIP from every file that holds its text side; others are named and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import encoder_layouts as layouts
import pytest
import torch

from lowvram_i2v.convert.shapes import clip_shapes
from lowvram_i2v.convert.sources import Hints, open_component
from lowvram_i2v.convert.sources.clip import detect_clip
from lowvram_i2v.convert.sources.encoder_configs import clip_config
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.synth.sizes import SIZES, clip_json

CONFIG = json.loads((layouts.CLIP_FOLDER / "config.json").read_text())
HINTS = Hints(tokenizer=layouts.CLIP_FOLDER)


@pytest.fixture(scope="module")
def tensors() -> layouts.Tensors:
    return layouts.clip()


def around(tensors: layouts.Tensors) -> layouts.Tensors:
    """What the whole CLIP has beside its text side."""
    return {
        **tensors,
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(3)[None],
        "vision_model.embeddings.class_embedding": torch.zeros(4),
        "visual_projection.weight": torch.zeros(2, 4),
        "text_projection.weight": torch.zeros(2, 4),
        "logit_scale": torch.tensor(2.66),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["clip_l", "whole", "bare"])
def test_values_and_names(layout: str, dtype: torch.dtype, tensors: layouts.Tensors, tmp_path: Path) -> None:
    stored = layouts.in_dtype(tensors, dtype)
    written = {
        "clip_l": stored,
        "whole": around(stored),
        "bare": {name.removeprefix("text_model."): value for name, value in stored.items()},
    }[layout]
    path = layouts.save(written, tmp_path / "clip_l.safetensors", {"format": "pt"})
    source = open_component(path, "text_encoder_2", HINTS)
    assert source.tensors.keys() == stored.keys()
    for name, value in stored.items():
        assert source.tensors[name].dtype == dtype
        assert torch.equal(source.tensors[name].read(), value), name
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == clip_shapes(source.config)
    assert source.config == CONFIG
    assert {file.name for file in source.tokenizer} >= {"vocab.json", "merges.txt"}


def test_a_folder_as_published(tensors: layouts.Tensors, tmp_path: Path) -> None:
    """Both a pickle and safetensors lie there, and a config.json of the whole."""
    shutil.copytree(layouts.CLIP_FOLDER, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"])
    layouts.save(around(tensors), tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": CONFIG}))
    source = open_component(tmp_path, "text_encoder_2")
    assert source.path == tmp_path / "model.safetensors"
    assert source.config == CONFIG
    assert all(torch.equal(source.tensors[name].read(), value) for name, value in tensors.items())


def test_a_bare_file_has_the_released_config() -> None:
    released = clip_json(SIZES["full"])["text_config"]
    made = clip_config(clip_shapes(released), Path("x"))
    assert {key: made[key] for key in released} == released
    assert len(clip_shapes(made)) == 196


def test_a_bare_file_needs_a_tokenizer(tensors: layouts.Tensors, tmp_path: Path) -> None:
    path = layouts.save(tensors, tmp_path / "clip_l.safetensors")
    (tmp_path / "empty").mkdir()
    for hints in (Hints(), Hints(tokenizer=tmp_path / "empty")):
        with pytest.raises(CheckpointError) as caught:
            open_component(path, "text_encoder_2", hints)
        for part in ("--tokenizer-2", "tokenizer.json", "vocab.json and merges.txt", "openai/clip-vit-large-patch14"):
            assert part in str(caught.value)


def test_a_width_that_tells_no_heads_needs_a_config(tmp_path: Path) -> None:
    path = layouts.save_hollow(clip_shapes(CONFIG | {"hidden_size": 40}), tmp_path / "clip_l.safetensors", "F16")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(layouts.CLIP_FOLDER / name, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"CLIP 40 wide(.|\n)*config\.json"):
        open_component(path, "text_encoder_2")
    assert open_component(path, "text_encoder_2", Hints(config=layouts.CLIP_FOLDER)).config == CONFIG


def test_other_clips_are_named() -> None:
    embedding, layer = "embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"
    wide = {f"text_model.{embedding}": (49408, 1280), f"text_model.{layer}": (1280, 1280)}
    match = detect_clip(wide, {})
    assert match is not None
    assert "CLIP-G" in str(match.refusal)
    for prefix in ("", "cond_stage_model.model.", "conditioner.embedders.1.model."):
        match = detect_clip({f"{prefix}transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)}, {})
        assert match is not None
        assert "OpenCLIP" in str(match.refusal)
    assert detect_clip({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, {}) is None


def test_refusals_say_what_the_file_is(tmp_path: Path) -> None:
    path = layouts.save({"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(6, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="OpenCLIP"):
        open_component(path, "text_encoder_2", HINTS)
    with pytest.raises(CheckpointError, match=r"is not CLIP.*: it has"):
        open_component(
            layouts.save(layouts.vision(layouts.llava()), tmp_path / "y.safetensors"), "text_encoder_2", HINTS
        )
