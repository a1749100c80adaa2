"""Golden F: ids, pixels, image features, hidden rows, pooled vector; the cases are read from the file."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from goldens import Sampled, relative_l2
from lowvram_i2v.text.encode import (
    black_image,
    encode_prompt,
    pooled_vector,
    prompt_rows,
    square_crop,
    vision_pixels,
)
from lowvram_i2v.text.llava import SKIPPED_LAYERS, image_rows
from lowvram_i2v.text.template import DEFAULT_NEGATIVE_PROMPT, PREFIX, TEXT_LENGTH, USER_LEAD

pytestmark = pytest.mark.golden
GATE = 1e-5


def first_rows(expected: Any, count: int) -> Any:
    """The first `count` rows of a golden [1, rows, width]."""
    width = expected.shape[-1]
    if isinstance(expected, Sampled):
        return Sampled(expected.values[: -(-count * width // expected.stride)], expected.stride, (count, width))
    return expected[0, :count]


def real_ids(text: Any, name: str) -> list[int]:
    ids, mask = text.golden[f"{name}input_ids"][0], text.golden[f"{name}attention_mask"][0]
    return ids[mask.bool()].tolist()


def test_settings_are_the_code_s_defaults(text: Any) -> None:
    config = text.golden.info["config"]
    assert text.llava_tokenizer.prefix_length == config["crop_start"]
    assert text.llava_tokenizer.max_length == config["max_length"]
    assert image_rows(text.llava.config) == config["image_emb_len"]
    if text.golden.name == "F_text":
        assert (config["text_len"], config["hidden_state_skip_layer"]) == (TEXT_LENGTH, SKIPPED_LAYERS)
        assert text.cases["negative"]["prompt"] == DEFAULT_NEGATIVE_PROMPT
    tokens = text.golden.info["info"]["template_prefix_tokens"]
    assert "".join((*PREFIX, USER_LEAD)) == "".join(tokens).replace("Ġ", " ").replace("Ċ", "\n")


def test_ids(text: Any) -> None:
    for case, entry in text.cases.items():
        tokens = text.llava_tokenizer.encode(entry["prompt"])
        assert list(tokens.ids) == real_ids(text, f"{case}."), case
        assert tokens.image_index == text.golden.info["config"]["image_emb_start"]
        ids, _ = text.clip_tokenizer.encode(entry["prompt"])
        assert ids == real_ids(text, f"{case}.clip."), case
        padded = text.golden[f"{case}.clip.input_ids"][0].tolist()
        assert padded == ids + [text.clip_tokenizer.end_id] * (len(padded) - len(ids))


def test_row_counts_are_the_masks_(text: Any) -> None:
    for name in text.golden.tensors:
        if not (match := re.fullmatch(r"(\w+)\.interleave(\d+)\.mask", name)):
            continue
        case, stride = match[1], int(match[2])
        kept = text.llava_tokenizer.encode(text.cases[case]["prompt"]).text_rows
        images = len(range(0, image_rows(text.llava.config), stride))
        assert images + len(kept) == int(text.golden[name].sum()), name


def test_pixels(text: Any) -> None:
    size = text.llava.config.vision_config.image_size
    picture = text.image("short")
    expected = text.golden["pixel.u8_after_resize_crop"]
    u8 = torch.from_numpy(square_crop(picture, size).transpose(2, 0, 1).copy())
    assert relative_l2(u8.float(), expected) == 0
    values = text.golden["pixel.values_every_12th"]
    every = -(-size // values.shape[-1])
    assert torch.equal(vision_pixels(picture, size)[:, ::every, ::every], values)
    black = vision_pixels(black_image(picture), size)
    np.testing.assert_array_equal(
        black, text.golden["pixel.black_value_per_channel"][:, None, None].expand(3, size, size)
    )


def test_image_features_and_every_row_of_the_sequence(text: Any) -> None:
    outputs: dict[str, torch.Tensor] = {}
    model = text.llava
    hooks = [
        model.multi_modal_projector.register_forward_hook(lambda *a: outputs.update(features=a[-1])),
        model.language_model.norm.register_forward_hook(lambda *a: outputs.update(sequence=a[-1])),
    ]
    for case, entry in text.cases.items():
        features, sequence = f"{case}.image_features_after_projector", f"{case}.full_sequence_hidden_state"
        if features not in text.golden and sequence not in text.golden:
            continue
        prompt_rows(model, text.llava_tokenizer, entry["prompt"], text.image(case), 4)
        if features in text.golden:
            assert relative_l2(outputs["features"], text.golden[features]) < GATE
        if sequence in text.golden:
            actual = outputs["sequence"][0]
            assert relative_l2(actual, first_rows(text.golden[sequence], len(actual))) < GATE
    for hook in hooks:
        hook.remove()
    assert set(outputs) == {"features", "sequence"}


def test_hidden_rows(text: Any) -> None:
    checked = 0
    for name, expected in text.golden.tensors.items():
        if not (match := re.fullmatch(r"(\w+)\.interleave(\d+)\.hidden_\w+_rows", name)):
            continue
        case, stride = match[1], int(match[2])
        prompt, image = text.cases[case]["prompt"], text.image(case)
        rows = prompt_rows(text.llava, text.llava_tokenizer, prompt, image, stride)
        meant = f"{case}.text_rows_if_treated_like_long"
        if meant in text.golden:  # the reference loses rows of a prompt that is cut off after a blank line
            images = len(range(0, image_rows(text.llava.config), stride))
            assert relative_l2(rows[:images], first_rows(expected, images)) < GATE, name
            assert relative_l2(rows[None, images:], text.golden[meant]) < GATE, name
        else:
            assert relative_l2(rows, first_rows(expected, len(rows))) < GATE, name
        assert len(rows) == int(text.golden[f"{case}.interleave{stride}.mask"].sum())
        checked += 1
    assert checked >= len(text.cases)


def test_pooled_vector(text: Any) -> None:
    for case, entry in text.cases.items():
        pooled = pooled_vector(text.clip, text.clip_tokenizer, entry["prompt"])
        assert relative_l2(pooled[None], text.golden[f"{case}.clip.pooled"]) < GATE, case


def test_padding_would_change_nothing(text: Any) -> None:
    prompt = text.cases["short"]["prompt"]
    padded = text.clip(input_ids=text.golden["short.clip.input_ids"].long())
    pooled = pooled_vector(text.clip, text.clip_tokenizer, prompt)
    assert relative_l2(padded.pooler_output[0], pooled) < 1e-6


def test_encode_prompt_gives_both(text: Any) -> None:
    prompt, image = text.cases["short"]["prompt"], text.image("short")
    both = encode_prompt(text.llava, text.llava_tokenizer, text.clip, text.clip_tokenizer, prompt, image, 4)
    assert torch.equal(both.prompt_embeds, prompt_rows(text.llava, text.llava_tokenizer, prompt, image, 4))
    assert torch.equal(both.pooled_prompt_embeds, pooled_vector(text.clip, text.clip_tokenizer, prompt))
