"""The commands decode and compare: flags become values, everything wrong is refused before the pipeline is asked."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram_i2v import pipeline
from lowvram_i2v.cli_media import add_commands
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.latents_file import save_latents
from lowvram_i2v.profile import DECODE_POLICIES, DEFAULT_PROFILE, load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.video import write_video


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args([str(argument) for argument in arguments])
    return options.command(options)


def save(path, **about):
    request = GenerateRequest(Path("photo.png"), "It moves.", Path("o.mp4"), frames=9, size=(64, 48))
    save_latents(path, torch.zeros(16, 3, 6, 8), request.to_settings(variant="token_replace", **about))
    return path


@pytest.fixture
def decoded(monkeypatch):
    """Calls of the pipeline's `decode_file`, which makes nothing."""
    calls = []

    def decode_file(latents, folder, profile, device, output, listen):
        calls.append((latents, folder, profile, device, output))
        return output

    monkeypatch.setattr(pipeline, "decode_file", decode_file, raising=False)
    return calls


def test_decode_takes_model_and_output_from_the_latents(tmp_path, decoded, capsys):
    path = save(tmp_path / "out.mp4.latents.safetensors", model="/models/a")
    assert run("decode", path, "--device", "cpu") == 0
    ((latents, folder, profile, device, output),) = decoded
    assert latents.path == path
    assert (folder, device.type, output) == (Path("/models/a"), "cpu", tmp_path / "out.mp4")
    assert profile == load_profile(DEFAULT_PROFILE)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.mp4")
    assert path.is_file()


@pytest.mark.parametrize("policy", DECODE_POLICIES)
def test_flags_of_decode_win(tmp_path, decoded, policy):
    path = save(tmp_path / "out.mp4.latents.safetensors", model="/models/a")
    flags = ("--model", "b", "--output", "c.mp4", "--policy", policy, "--device", "cpu")
    assert run("decode", path, *flags) == 0
    ((_, folder, profile, _, output),) = decoded
    assert (folder, output, profile.decode) == (Path("b"), Path("c.mp4"), policy)
    assert profile.name == DEFAULT_PROFILE


def test_what_decode_lacks_is_said(tmp_path, decoded):
    with pytest.raises(RequestError, match="--model not given"):
        run("decode", save(tmp_path / "out.mp4.latents.safetensors"), "--device", "cpu")
    with pytest.raises(RequestError, match="--output not given"):
        run("decode", save(tmp_path / "other.safetensors", model="m"), "--device", "cpu")
    with pytest.raises(RequestError, match="profile"):
        run("decode", save(tmp_path / "out.mp4.latents.safetensors", model="m"), "--profile", "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run("decode", tmp_path / "none.safetensors")
    with pytest.raises(SystemExit):
        run("decode", save(tmp_path / "out.mp4.latents.safetensors"), "--policy", "nothing")
    assert decoded == []


def test_compare_prints_the_figures(tmp_path, capsys):
    random = np.random.default_rng(0)
    frames = [random.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(4)]
    for name in ("a.mp4", "b.mp4"):
        write_video(frames, tmp_path / name, 24, {})
    assert run("compare", tmp_path / "a.mp4", tmp_path / "b.mp4") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["frames", "4", "of", "64x48"]
    assert "inf dB" in printed[1]
    assert run("compare", tmp_path / "a.mp4", tmp_path / "b.mp4", "--per-frame") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(printed) + 5
    assert run("compare", tmp_path / "a.mp4", tmp_path / "b.mp4", "--tile", "32") == 0
    more = capsys.readouterr().out.splitlines()[len(printed) :]
    assert [line.split(":")[0] for line in more] == [
        f"seams of {video}, {axis}" for video in ("a", "b", "b - a") for axis in ("columns", "rows")
    ]
    with pytest.raises(RequestError, match="a tile of 8 frames is too small"):
        run("compare", tmp_path / "a.mp4", tmp_path / "b.mp4", "--tile-frames", "8")


def test_compare_refuses_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(RequestError, match="cannot be read as a video"):
        run("compare", tmp_path / "a.mp4", tmp_path / "a.mp4")
