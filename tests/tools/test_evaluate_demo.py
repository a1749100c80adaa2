"""The command that measures a demo model: its controls, what it asks of a model, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowvram_i2v import pipeline
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.video import write_video
from tools.evaluate_demo import main
from tools.train_demo.evaluation import held_out_scenes
from tools.train_demo.render import render


def share(printed: str) -> float:
    line = next(line for line in printed.splitlines() if line.startswith("motion right"))
    return float(line.split()[2])


def test_controls_need_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--videos", "12", "--control", "rendered"]) == 0
    assert share(capsys.readouterr().out) >= 98
    assert main(["--videos", "12", "--control", "static"]) == 0
    assert share(capsys.readouterr().out) == 0


@pytest.fixture
def perfect_model(monkeypatch: pytest.MonkeyPatch) -> list[GenerateRequest]:
    """In place of the pipeline: videos as rendered, through the mp4. Returns the requests as they come."""
    requests: list[GenerateRequest] = []

    def generate(request: GenerateRequest, *others: object) -> Path:
        request.check()
        scene = held_out_scenes(len(requests) + 1, seed=0)[-1]
        write_video(render(scene), request.output, request.fps, {})
        requests.append(request)
        return request.output

    monkeypatch.setattr(pipeline, "generate", generate)
    return requests


def test_a_model_is_asked_for_each_scene_and_measured(
    perfect_model: list[GenerateRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, written = tmp_path / "kept", tmp_path / "results.json"
    flags = ["--model", str(tmp_path), "--videos", "3", "--device", "cpu"]
    assert main([*flags, "--keep", str(kept), "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert share(printed) == 100
    assert "WRONG" not in printed
    results = json.loads(written.read_text())["results"]
    assert all(result["right"] and result["colour_kept"] and result["psnr"] > 30 for result in results)
    for request, scene in zip(perfect_model, held_out_scenes(3, seed=0), strict=True):
        assert (request.prompt, request.size, request.frames) == (scene.prompt, scene.size, scene.frames)
        assert np.array_equal(np.asarray(Image.open(request.image)), render(scene)[0])
    perfect_model.clear()
    assert main([*flags, "--against", str(kept)]) == 0
    assert "PSNR 100.00 dB" in capsys.readouterr().out


def test_the_shuffled_control_asks_for_something_else(perfect_model: list[GenerateRequest]) -> None:
    assert main(["--model", "any", "--videos", "3", "--device", "cpu", "--control", "shuffled"]) == 0
    own = [scene.prompt for scene in held_out_scenes(3, seed=0)]
    assert all(request.prompt != prompt for request, prompt in zip(perfect_model, own, strict=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--videos", "0", "--control", "static"], "--videos is 0"),
        (["--model", "nowhere"], "model.json"),
        (["--against", "nowhere"], "lacks 100 of 100"),
        (["--control", "static", "--against", "nowhere"], "leaves no videos"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 1
    assert words in capsys.readouterr().err
