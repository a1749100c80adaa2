"""The table of what each way to run the demo model costs: its rows, its controls, how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram_i2v.attention import sdpa
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.kernels.attention_reference import relative_l2
from tools import demo_table
from tools.attention_stand_in import attend
from tools.demo_table import REFERENCE, SHUFFLED, STATIC, WAYS, Settings, Way, parse_way, read_lines, run, summary
from tools.evaluate_demo import main
from tools.train_demo.evaluation import held_out_scenes, still_video
from tools.train_demo.render import render

CPU = torch.device("cpu")
SCENES = {scene.prompt: scene for scene in held_out_scenes(4, seed=0)}
NOISE = {"bf16": 0, "int8": 2, "nf4": 12}
Make = Callable[..., Settings]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the model: scenes as rendered with a scheme's noise; nothing moves for another scene's prompt, and
    as a list what was asked for."""
    calls: list[str] = []

    def frames_of(request: Any, model: Path, profile: Any, *_: object) -> demo_table.Video:
        calls.append(f"{model.name} {profile.compute} {profile.attention} {profile.decode}")
        picture = np.asarray(demo_table.Image.open(request.image))
        scene = next(scene for scene in SCENES.values() if np.array_equal(render(scene)[0], picture))
        video = render(scene) if scene.prompt == request.prompt else still_video(scene)
        level = NOISE[model.name.removeprefix("model-")]
        noise = np.random.default_rng(0).integers(-level, level + 1, video.shape)
        return np.clip(video + noise, 0, 255).astype(np.uint8)

    monkeypatch.setattr(demo_table, "frames_of", frames_of)
    return calls


@pytest.fixture
def settings(tmp_path: Path) -> Make:
    for scheme in NOISE:
        (tmp_path / f"model-{scheme}").mkdir()
        (tmp_path / f"model-{scheme}" / "model.json").write_text(scheme)

    def make(videos: int = 2, minutes: float = 9, ways: tuple[Way, ...] = (REFERENCE, Way("int8"), Way("nf4"))) -> Any:
        return Settings(tmp_path, tmp_path / "results.jsonl", ways, videos, 0, 3, None, minutes, 1)

    return make


def test_every_kind_of_way_is_in_the_table() -> None:
    assert {way.scheme for way in WAYS} == {"bf16", "int8", "fp8", "nf4"}
    assert {way.compute for way in WAYS} == {"w8a16", "w8a8"}
    assert {way.attention for way in WAYS} == {"sdpa", "triton-int8", "triton-sparse"}
    assert {"reference", "seamless"} <= {way.decode for way in WAYS}
    assert [parse_way(str(way)) for way in WAYS] == list(WAYS)
    with pytest.raises(RequestError, match="SCHEME"):
        parse_way("int8 w8a8 sdpa seamless much")


def test_rows_compare_with_the_reference_and_controls_score_lower(asked: list[str], settings: Make) -> None:
    wanted = settings()
    lines = run(wanted, CPU)
    printed = list(summary(lines, wanted))
    rows = {row.split(" | ")[0].strip("| "): row for row in printed if row.startswith("|")}
    assert "100 %" in rows["bf16"]
    assert rows["bf16"].endswith("| |")
    apart = [float(rows[scheme].split()[-3]) for scheme in ("int8", "nf4")]
    assert apart[0] > apart[1] + 10
    assert " 0 %" in rows[f"control: {STATIC}"]
    assert " 0 %" in rows[f"control: {SHUFFLED}"]
    assert any("2 of 2 held-out scenes" in line for line in printed)
    assert any(line.startswith("motion right      100.0 %") for line in printed)
    assert asked[:4] == ["model-bf16 w8a16 sdpa reference", "model-int8 w8a16 sdpa reference", asked[2], asked[1]]


def test_it_goes_on_where_it_was_killed(asked: list[str], settings: Make) -> None:
    assert run(settings(minutes=0), CPU) == []
    assert next(summary([], settings())) == "no scene is done yet"
    run(settings(videos=1), CPU)
    results = settings().results
    whole = results.read_text()
    results.write_text(whole + '{"number": 1, "dev')
    asked.clear()
    lines = run(settings(), CPU)
    assert [line.number for line in lines] == [0, 1]
    assert len(asked) == 4
    assert results.read_text().startswith(whole)
    assert lines == read_lines(settings())
    asked.clear()
    assert run(settings(), CPU) == lines
    assert asked == []


@pytest.mark.usefixtures("asked")
def test_other_weights_do_not_go_on(settings: Make, tmp_path: Path) -> None:
    run(settings(videos=1), CPU)
    (tmp_path / "model-int8" / "model.json").write_text("trained longer")
    with pytest.raises(RequestError, match="other weights"):
        run(settings(), CPU)
    with pytest.raises(CheckpointError, match="model-fp8"):
        run(settings(ways=(REFERENCE, Way("fp8"))), CPU)
    with pytest.raises(RequestError, match="no row is bf16"):
        run(settings(ways=(Way("int8"),)), CPU)


@pytest.mark.usefixtures("asked", "settings")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--table", str(tmp_path / "t.jsonl"), "--videos", "1", "--device", "cpu"]
    assert main(flags) == 1
    assert "--models" in capsys.readouterr().err
    assert main([*flags, "--models", str(tmp_path), "--row", "bf16", "--row", "nf4 w8a16 triton-int8"]) == 0
    printed = capsys.readouterr().out
    assert "| nf4 | w8a16 | triton-int8 | reference |" in printed


def test_the_stand_in_is_as_far_off_as_8_bits_are() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 150, 2, 64, generator=generator).unbind()
    shifted = attend(q, k + 5, v)
    assert 0.005 < relative_l2(attend(q, k, v), sdpa.attend(q, k, v)) < 0.06
    assert relative_l2(shifted, attend(q, k, v)) < 1e-3
