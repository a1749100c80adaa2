"""What a run keeps: latents until the video is complete, encoded prompts and pictures for the next seed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v import cli, pipeline

Flags = list[str]

ROOT = Path(__file__).resolve().parents[2]
KILLED_MIDWAY = """
import os, signal, sys, time, torch
from lowvram_i2v import cli, pipeline
torch.set_num_threads(int(sys.argv[1]))
whole = pipeline.decode_frames
def some(*arguments):
    yield next(whole(*arguments))[:, :5]
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
pipeline.decode_frames = some
cli.main(sys.argv[2:])
"""


@pytest.fixture
def flags(model_once: Made, tmp_path: Path) -> Flags:
    """A small run on the CPU, with CFG, all but the seed."""
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "photo.png")
    return [
        *("generate", "--model", str(model_once("token_replace", "int8")), "--image", str(tmp_path / "photo.png")),
        *("--prompt", "a boat", "--size", "64x48", "--frames", "9", "--steps", "2", "--cfg", "2", "--device", "cpu"),
        *("--output", str(tmp_path / "out.mp4")),
    ]


def test_a_killed_decode_is_finished_later_with_the_same_bytes(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, latents = tmp_path / "out.mp4", tmp_path / "out.mp4.latents.safetensors"
    assert cli.main([*flags, "--seed", "1", "--preview", "1"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("photo.png", "out.mp4", "out.mp4.json", "out.mp4.preview.webp")
    }
    whole = output.read_bytes()
    output.unlink()

    def killed(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode_frames", killed)
        assert cli.main([*flags, "--seed", "1"]) == 130
    assert f"lowvram-i2v decode {latents}" in capsys.readouterr().err
    assert latents.exists()
    latents.unlink()

    command = [sys.executable, "-c", KILLED_MIDWAY, str(torch.get_num_threads()), *flags, "--seed", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr  # while frames are written, with no chance to clean up
    assert not output.exists()
    assert cli.main(["decode", str(latents), "--device", "cpu"]) == 0
    assert output.read_bytes() == whole


def test_another_seed_loads_no_encoder(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWVRAM_I2V_CACHE", str(tmp_path / "cache"))
    assert cli.main([*flags, "--seed", "1"]) == 0
    first = (tmp_path / "out.mp4").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("an encoder is built again")

    with monkeypatch.context() as patch:
        for name in ("_encode", "VaeEncoder"):
            patch.setattr(pipeline, name, never)
        assert cli.main([*flags, "--seed", "1"]) == 0
        assert "taken from the cache" in capsys.readouterr().err
        assert (tmp_path / "out.mp4").read_bytes() == first
        with pytest.raises(AssertionError, match="built again"):
            cli.main([*flags, "--seed", "2", "--no-cache"])
        with pytest.raises(AssertionError, match="built again"):
            cli.main([*flags, "--seed", "2", "--prompt", "another boat"])
