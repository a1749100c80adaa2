"""The evaluation of the demo model: its controls score far lower than what is right, and its table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.train_demo.evaluation import (
    Report,
    evaluate,
    held_out_scenes,
    interval,
    judge,
    shuffled_prompts,
    still_video,
)
from tools.train_demo.render import render
from tools.train_demo.scenes import Scene

SCENES = held_out_scenes(40, seed=23)


def test_a_video_that_stands_still_scores_nothing() -> None:
    report = evaluate(SCENES[:20], still_video)
    assert report.motion_right == 0
    assert report.psnr == 100
    assert max(result.flicker for result in report.results) == 0


def test_the_motion_of_another_prompt_scores_nothing() -> None:
    """What a model makes that follows the shuffled prompts: the scene's objects do what the other scene's do."""
    alone = [scene for scene in SCENES if len(scene.things) == 1]
    turned = alone[1:] + alone[:1]
    pairs = [(a, b) for a, b in zip(alone, turned, strict=True) if a.script.motion != b.script.motion]
    results = [judge(scene, render(acting(scene, other))) for scene, other in pairs]
    assert len(results) >= 15
    assert Report(tuple(results)).motion_right <= 0.1


def acting(scene: Scene, other: Scene) -> Scene:
    subject = replace(scene.script.subjects[0], action=other.script.motion[0])
    script = replace(scene.script, subjects=(subject,), camera=other.script.camera)
    return replace(scene, script=script, things=(replace(scene.things[0], subject=subject),))


def test_shuffled_prompts_are_those_of_other_motions() -> None:
    sample = SCENES[:20]
    for scene, shuffled in zip(sample, shuffled_prompts(sample), strict=True):
        assert shuffled.script == scene.script
        assert shuffled.prompt != scene.prompt
    with pytest.raises(ValueError, match="same motion"):
        shuffled_prompts(sample[:1])


def test_a_video_of_another_size_is_refused() -> None:
    scene = SCENES[0]
    with pytest.raises(ValueError, match="the video is"):
        judge(scene, render(scene)[:-1])


def test_the_table_says_all() -> None:
    lines = "\n".join(evaluate(SCENES[:6], render).lines())
    for words in ("videos            6", "motion right      100.0 %", "camera still", "flicker", "colour kept"):
        assert words in lines
    low, high = interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
