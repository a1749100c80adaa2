"""What a component must hold: the released names and shapes, and those of the modules that load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from goldens import FOLDER
from lowvram_i2v.convert.infer import infer_transformer, infer_variant
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.synth.sizes import SIZES, clip_json, llava_json, transformer_config
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.variant import VARIANTS

NAMES = Path(__file__).parents[1] / "golden" / "names"
IDS = {"begin": 0, "end": 1, "image": 2, "pad": 3}


def released_names(file: str) -> Shapes:
    return {name: tuple(shape) for name, shape in json.loads((NAMES / file).read_text()).items()}


def released_transformer(variant: str) -> Shapes:
    """The table is token_replace's; latent_concat has another patch embedder and no guidance embedder."""
    shapes = released_names("official_names.json")
    if variant == "latent_concat":
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("guidance_in.")}
        hidden, _, *patch = shapes["img_in.proj.weight"]
        shapes["img_in.proj.weight"] = (hidden, 33, *patch)
    return shapes


@pytest.mark.parametrize(("variant", "count"), [("token_replace", 856), ("latent_concat", 852)])
def test_transformer_names_are_the_released_ones(variant: str, count: int) -> None:
    shapes = released_transformer(variant)
    config = transformer_config(SIZES["full"], VARIANTS[variant])
    assert transformer_shapes(config) == shapes
    assert len(shapes) == count
    assert infer_transformer(shapes) == config
    assert infer_variant(config, None, Path("ckpts/hunyuan-video-i2v-720p/x.pt")) == variant


def test_vae_names_are_the_released_ones() -> None:
    shapes = released_names("official_vae_names.json")
    assert vae_shapes(SIZES["full"].vae) == shapes
    assert len(shapes) == 248


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_read_back_from_shapes(size: str, variant: str) -> None:
    config = transformer_config(SIZES[size], VARIANTS[variant])
    assert infer_transformer(transformer_shapes(config)) == config


def text_configs() -> list[Any]:
    golden = FOLDER / "hf"
    return [
        *((llava_json(size, IDS), clip_json(size)["text_config"]) for size in SIZES.values()),
        tuple(
            json.loads((golden / name / "config.json").read_text()) for name in ("text_encoder_i2v", "text_encoder_2")
        ),
    ]


@pytest.mark.parametrize(("llava", "clip"), text_configs(), ids=[*SIZES, "golden"])
def test_text_formulas_agree_with_the_modules(llava: dict[str, Any], clip: dict[str, Any]) -> None:
    for shapes, module, name_of in (
        (llava_shapes(llava), build_llava(llava, skipped_layers=0), llava_tensor_name),
        (clip_shapes(clip), build_clip(clip), clip_tensor_name),
    ):
        built = {name_of(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        assert {name: shapes.get(name) for name in built} == built
        left = {name for name in shapes if name not in built}
        # not read at run time: the final norms and the last vision layer
        last = f"vision_model.encoder.layers.{llava['vision_config']['num_hidden_layers'] - 1}."
        assert all(name.startswith((last, "vision_model.post_layernorm.", "model.norm.")) for name in left), left


def test_full_llava_has_the_released_size() -> None:
    shapes = llava_shapes(llava_json(SIZES["full"], IDS))
    head = shapes["model.embed_tokens.weight"]
    parameters = sum(torch.Size(shape).numel() for shape in [*shapes.values(), head])
    assert (len(shapes) + 1, parameters) == (686, 8_355_272_704)


@pytest.mark.parametrize(
    "change",
    [
        {"img_in.proj.weight": None},
        {"img_in.proj.weight": (256, 16)},
        {"img_in.proj.weight": (200, 16, 1, 2, 2)},
        {"final_layer.linear.weight": None},
        {"txt_in.input_embedder.weight": ()},
        {"vector_in.in_layer.weight": (0, 48)},
    ],
)
def test_shapes_that_are_not_the_transformers(change: dict[str, Any]) -> None:
    shapes = transformer_shapes(transformer_config(SIZES["tiny"], VARIANTS["token_replace"])) | change
    with pytest.raises(CheckpointError, match="HunyuanVideo-I2V"):
        infer_transformer({name: shape for name, shape in shapes.items() if shape is not None})


def test_a_gap_in_the_blocks_is_named() -> None:
    shapes = released_transformer("token_replace")
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("single_blocks.17.")}
    with pytest.raises(CheckpointError, match=r"single_blocks run up to number 39, but these are missing: \[17\]"):
        infer_transformer(shapes)


def test_sixteen_channels_outside_a_released_tree_ask_for_the_variant() -> None:
    config = transformer_config(SIZES["tiny"], VARIANTS["token_replace"])
    with pytest.raises(RequestError, match="--variant token_replace"):
        infer_variant(config, None, Path("downloads/model.pt"))
    assert infer_variant(config, "token_replace", Path("downloads/model.pt")) == "token_replace"


@pytest.mark.parametrize(
    "config", [{}, {"text_config": 3}, {"text_config": {}}, {"text_config": {"hidden_size": "x"}, "vision_config": {}}]
)
def test_configs_that_are_not_llavas(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        llava_shapes(config)
