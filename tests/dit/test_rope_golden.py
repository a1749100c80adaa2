"""Rotary tables against the reference, and the rule that RIFLEx never raises a frequency."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goldens import Golden, Sampled, golden, names
from lowvram_i2v.dit.rope import rope_table, token_grid

ROPE = names("C_")


def table(case: Golden, grid: tuple[int, int, int], frames: int) -> tuple[Tensor, Tensor]:
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


def raised_columns(case: Golden, frames: int, latent_frames: int) -> slice | None:
    """The columns of the frequency that the reference raises for so long a video, where it should lower it: there the
    tables differ on purpose."""
    config = case.info["config"]
    j = min(max(2 + (frames + 3) // 100, 4), 8) - 1
    plain = config["theta"] ** (-2 * j / config["rope_dim_list"][0])
    return slice(2 * j, 2 * j + 2) if frames > 192 and 0.9 * 2 * math.pi / latent_frames > plain else None


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
        but = raised_columns(case, frames, grid[0])
        assert largest_difference(cos[rows], case[f"{key}.cos"], but) < 1e-6, key
        assert largest_difference(sin[rows], case[f"{key}.sin"], but) < 1e-6, key


@pytest.mark.golden
@pytest.mark.parametrize("name", ROPE)
def test_time_axis_of_long_videos(name: str) -> None:
    case = golden(name)
    time_dim = case.info["config"]["rope_dim_list"][0]
    cases = {key: size for key, size in case.info["cases"].items() if key.startswith("riflex.time_only.")}
    raised = {key: raised_columns(case, size["frames"], size["latent_frames"]) for key, size in cases.items()}
    assert not cases or None in raised.values(), "nothing would be compared in full"
    for key, size in cases.items():
        cos, sin = table(case, (size["latent_frames"], 1, 1), size["frames"])
        assert largest_difference(cos[:, :time_dim], case[f"{key}.cos"], raised[key]) < 1e-6, key
        assert largest_difference(sin[:, :time_dim], case[f"{key}.sin"], raised[key]) < 1e-6, key


@given(st.integers(1, 300))
def test_riflex_lowers_at_most_one_frequency_and_only_above_192_frames(n: int) -> None:
    frames = 4 * n + 1
    short, _ = rope_table((2, 1, 1), (16, 56, 56), 256.0, frames=1)
    grid = (2, 1, 1) if frames <= 192 else (n + 1, 1, 1)
    long, _ = rope_table(grid, (16, 56, 56), 256.0, frames)
    before, after = short[1].arccos(), long[1].arccos()
    assert (after <= before + 1e-6).all()
    assert int((after < before - 1e-6).sum()) <= (frames > 192)
