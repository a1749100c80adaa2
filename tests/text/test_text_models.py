"""What is built of the two text encoders, under which names; the cut-down LLaVA equals the whole one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from goldens import FOLDER, weights
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.clip import build_clip, clip_tensor_name, official_clip_name
from lowvram_i2v.text.encode import prompt_rows, vision_pixels
from lowvram_i2v.text.llava import build_llava, image_rows, llava_tensor_name, official_llava_name

RELEASED_LLAVA = {
    "model_type": "llava",
    "image_token_index": 128257,
    "pad_token_id": 128258,
    "projector_hidden_act": "gelu",
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "vocab_size": 128320,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def test_released_size_without_the_layers_nobody_reads() -> None:
    model = build_llava(RELEASED_LLAVA)
    decoder, projector = 7_505_186_816 - 2 * 218_112_000 - 4096, 20_979_712
    vision = 303_507_456 - 12_596_224
    assert parameters(model) == decoder + vision + projector
    assert image_rows(model.config) == 576
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


def test_build_leaves_its_config_alone_and_its_buffers_real(text: Any) -> None:
    for build, config in ((build_llava, text.llava_config), (build_clip, text.clip_config)):
        before = copy.deepcopy(config)
        half = {**config, "torch_dtype": "float16"}
        with torch.device("meta"):
            model = build(config)
            build(half)
        assert config == before
        assert not model.training
        assert all(p.is_meta for p in model.parameters())
        assert all(b.device.type == "cpu" for b in model.buffers())
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_rotary_frequencies_do_not_follow_the_weights_dtype(text: Any) -> None:
    half = copy.deepcopy(text.llava_config)
    half["torch_dtype"] = half["text_config"]["torch_dtype"] = "float16"
    for (name, whole), (_, buffer) in zip(text.llava.named_buffers(), build_llava(half).named_buffers(), strict=True):
        assert torch.equal(whole, buffer), name
        assert whole.dtype == buffer.dtype


def test_every_built_parameter_has_its_file_name_and_shape(text: Any) -> None:
    for model, state, name_of in (
        (text.llava, text.llava_state, llava_tensor_name),
        (text.clip, text.clip_state, clip_tensor_name),
    ):
        built = {name_of(name): p.shape for name, p in model.named_parameters()}
        assert built == {name: state[name].shape for name in built}


def test_names_that_are_stored_but_not_built(text: Any) -> None:
    built = {llava_tensor_name(name) for name, _ in text.llava.named_parameters()}
    rest = text.llava_state.keys() - built
    layers = text.llava_config["text_config"]["num_hidden_layers"]
    skipped = text.golden.info["config"]["hidden_state_skip_layer"]
    vision_last = text.llava_config["vision_config"]["num_hidden_layers"] - 1
    unread = [f"model.layers.{n}." for n in range(layers - skipped, layers)]
    unread += ["model.norm.", f"vision_model.encoder.layers.{vision_last}."]
    assert {name for name in text.llava_state if name.startswith(tuple(unread))} == rest


def test_official_names() -> None:
    assert official_llava_name("language_model.lm_head.weight") is None
    assert official_llava_name("vision_tower.vision_model.embeddings.position_ids") is None
    for official in ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"):
        assert official_llava_name(official) == "vision_model.post_layernorm.bias"
    assert official_llava_name("language_model.model.norm.weight") == "model.norm.weight"
    for name in (
        "vision_model.x",
        "visual_projection.weight",
        "logit_scale",
        "text_model.embeddings.position_ids",
    ):
        assert official_clip_name(name) is None
    assert official_clip_name("text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    for official_name in (official_llava_name, official_clip_name):
        with pytest.raises(CheckpointError):
            official_name("double_blocks.0.img_mod.linear.weight")


def test_other_models_are_refused(text: Any) -> None:
    for change in (
        {"model_type": "llama"},
        {"vision_feature_layer": [-2, -3]},
        {"vision_feature_select_strategy": "full"},
    ):
        with pytest.raises(CheckpointError):
            build_llava({**text.llava_config, **change})
    with pytest.raises(CheckpointError):
        build_clip({**text.clip_config, "model_type": "t5"})


def test_a_whole_clip_s_config_gives_its_text_side(text: Any) -> None:
    whole = {
        "model_type": "clip",
        "text_config": text.clip_config,
        "vision_config": {},
        "projection_dim": 768,
    }
    assert parameters(build_clip(whole)) == parameters(text.clip)


@pytest.mark.golden
def test_bit_equal_to_the_whole_model_s_hidden_state(text: Any) -> None:
    """The published names loaded into the uncut class, and entry -(skipped + 1) of its hidden states."""
    from transformers import LlavaConfig, LlavaModel

    whole = LlavaModel(LlavaConfig.from_dict(copy.deepcopy(text.llava_config), attn_implementation="sdpa"))
    published = {}
    for path in sorted(text.llava_folder.glob("*.safetensors")):
        published |= weights(str(path.relative_to(FOLDER)))
    whole.load_state_dict(
        {
            name.replace("language_model.model.", "language_model.").replace("vision_model.", ""): value.clone()
            for name, value in published.items()
            if "lm_head" not in name
        }
    )
    whole.eval().requires_grad_(False)
    case = next(iter(text.cases))
    prompt, image = text.cases[case]["prompt"], text.image(case)
    tokens, count = text.llava_tokenizer.encode(prompt), image_rows(text.llava.config)
    first = tokens.image_index
    ids = (*tokens.ids[:first], *[text.llava_tokenizer.image_id] * count, *tokens.ids[first + 1 :])
    states = whole(
        input_ids=torch.tensor([ids]),
        pixel_values=vision_pixels(image, text.llava_config["vision_config"]["image_size"])[None],
        output_hidden_states=True,
    ).hidden_states
    expected = states[-(text.golden.info["config"]["hidden_state_skip_layer"] + 1)][0]
    rows = prompt_rows(text.llava, text.llava_tokenizer, prompt, image, 1)
    assert torch.equal(rows[:count], expected[first : first + count])
    assert torch.equal(rows[-1], expected[-1])
    assert text.llava.config.text_config._attn_implementation == "sdpa"
    assert text.llava.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.golden
def test_a_tokenizer_of_another_model_is_refused(text: Any) -> None:
    llava = copy.deepcopy(text.llava)
    llava.config.image_token_id += 1
    with pytest.raises(CheckpointError, match="image id"):
        prompt_rows(llava, text.llava_tokenizer, "", text.image(next(iter(text.cases))), 4)
