"""Latents beside the output: those of this run, or none of this run's business."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram_i2v import pipeline
from lowvram_i2v.errors import PlatformError, ResourceError
from lowvram_i2v.latents_file import latents_path


def job_in(folder: Path, said: list[Any]) -> Any:
    return SimpleNamespace(request=SimpleNamespace(output=folder / "out.mp4"), listen=said.append)


def test_an_older_runs_latents_are_neither_promised_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk has no room for this run's."""

    def full(*_: Any) -> None:
        raise ResourceError("the disk is full", "Free some space.")

    said: list[Any] = []
    job = job_in(tmp_path, said)
    older = latents_path(job.request.output)
    older.write_text("another run's")
    monkeypatch.setattr(pipeline, "save_latents", full)
    monkeypatch.setattr(pipeline, "_settings", lambda _: {})
    with pipeline.saved(job, torch.zeros(1)):
        pass
    with pytest.raises(RuntimeError), pipeline.saved(job, torch.zeros(1)):
        raise RuntimeError
    assert older.read_text() == "another run's"
    assert not any("are safe" in notice.text for notice in said)


def test_another_runs_latents_under_the_same_name_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with one output: the first to end removes its own."""
    said: list[Any] = []
    job = job_in(tmp_path, said)
    path = latents_path(job.request.output)
    monkeypatch.setattr(pipeline, "save_latents", lambda path, *_: path.write_text("ours"))
    monkeypatch.setattr(pipeline, "_settings", lambda _: {})
    with pipeline.saved(job, torch.zeros(1)):
        (tmp_path / "theirs").write_text("theirs")
        (tmp_path / "theirs").replace(path)
    assert path.read_text() == "theirs"
    with pipeline.saved(job, torch.zeros(1)):
        pass
    assert not path.exists()


def test_latents_that_are_no_numbers_end_the_run_with_a_way_out() -> None:
    profile = SimpleNamespace(name="6gb-fast", compute="w8a8", attention="triton-int8")
    job: Any = SimpleNamespace(profile=profile, model=SimpleNamespace(header=SimpleNamespace(scheme="int8")))
    pipeline._check_numbers(job, 1, torch.zeros(3))
    with pytest.raises(PlatformError, match="after step 1 the latents hold values that are not numbers") as caught:
        pipeline._check_numbers(job, 1, torch.tensor([0.0, float("nan")]))
    assert "check-kernels" in caught.value.remedy


def test_pieces_end_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when somebody collects them: they hold video memory and locked RAM."""
    ended: list[bool] = []

    def pieces() -> Any:
        try:
            yield torch.zeros(3, 1, 4, 4)
            yield torch.zeros(3, 1, 4, 4)
        finally:
            ended.append(True)

    def failing(frames: Any, *_: Any) -> None:
        next(frames)
        raise ResourceError("the disk is full", "Free some space.")

    monkeypatch.setattr(pipeline, "write_video", failing)
    job = job_in(tmp_path, [])
    job.request.fps = 24
    with pytest.raises(ResourceError) as caught:
        pipeline.write(job, pieces(), {})
    assert ended == [True], caught
