"""Rotary tables against the reference, and the rule that RIFLEx never raises a frequency."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goldens import Sampled, golden, names
from lowvram_i2v.dit.rope import rope_table, token_grid

ROPE = names("C_")


def table(case: object, grid: tuple[int, int, int], frames: int) -> tuple[Tensor, Tensor]:
    config = case.info["config"]
    cos, sin = rope_table(grid, tuple(config["rope_dim_list"]), config["theta"], frames)
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def largest_difference(actual: Tensor, expected: Tensor | Sampled, but: slice | None = None) -> float:
    """Largest absolute difference, columns `but` left out."""
    keep = torch.ones(actual.shape, dtype=torch.bool)
    if but is not None:
        keep[:, but] = False
    if isinstance(expected, Sampled):
        assert tuple(actual.shape) == expected.shape
        actual, keep = (x.reshape(-1)[:: expected.stride] for x in (actual, keep))
        expected = expected.values
    assert actual.shape == expected.shape
    return float((actual - expected)[keep].abs().max())


@pytest.mark.golden
@pytest.mark.parametrize("name", ROPE)
def test_plain_tables(name: str) -> None:
    case = golden(name)
    plain = sorted({key.split(".")[1] for key in case.tensors if key.startswith("plain.")})
    assert plain
    for key in plain:
        cos, sin = table(case, tuple(int(n) for n in key.split("_")), frames=1)
        assert largest_difference(cos, case[f"plain.{key}.cos"]) < 1e-6
        assert largest_difference(sin, case[f"plain.{key}.sin"]) < 1e-6


@pytest.mark.golden
@pytest.mark.parametrize("name", ROPE)
def test_tables_of_real_video_sizes(name: str) -> None:
    case = golden(name)
    sizes = {key: size for key, size in case.info["cases"].items() if "table_rows" in size}
    assert sizes
    for key, size in sizes.items():
        frames = size["frames"]
        grid = token_grid(frames, size["height"], size["width"])
        cos, sin = table(case, grid, frames)
        assert len(cos) == size["table_rows"], key
        rows = case[f"{key}.rows"] if f"{key}.rows" in case else slice(None)
        assert largest_difference(cos[rows], case[f"{key}.cos"]) < 1e-6, key
        assert largest_difference(sin[rows], case[f"{key}.sin"]) < 1e-6, key


@pytest.mark.golden
@pytest.mark.parametrize("name", ROPE)
def test_time_axis_of_long_videos(name: str) -> None:
    """Where the reference raises the replaced frequency, that one frequency differs on purpose; the rest is equal."""
    case = golden(name)
    config = case.info["config"]
    time_dim = config["rope_dim_list"][0]
    raised = 0
    for key, size in case.info["cases"].items():
        if not key.startswith("riflex.time_only."):
            continue
        cos, sin = table(case, (size["latent_frames"], 1, 1), size["frames"])
        j = size["replaced_frequency_index"]
        is_raised = size["replaced_frequency"] > config["theta"] ** (-2 * j / time_dim)
        but = slice(2 * j, 2 * j + 2) if is_raised else None
        raised += is_raised
        assert largest_difference(cos[:, :time_dim], case[f"{key}.cos"], but) < 2e-5, key
        assert largest_difference(sin[:, :time_dim], case[f"{key}.sin"], but) < 2e-5, key
    assert raised < len(case.info["cases"])


@given(st.integers(1, 300))
def test_riflex_lowers_at_most_one_frequency_and_only_above_192_frames(n: int) -> None:
    frames = 4 * n + 1
    short, _ = rope_table((2, 1, 1), (16, 56, 56), 256.0, frames=1)
    grid = (2, 1, 1) if frames <= 192 else (n + 1, 1, 1)
    long, _ = rope_table(grid, (16, 56, 56), 256.0, frames)
    before, after = short[1].arccos(), long[1].arccos()
    assert (after <= before + 1e-6).all()
    assert int((after < before - 1e-6).sum()) <= (frames > 192)
