"""The measure of the demo's videos: right on what the project renders, wrong where it has to be, and robust to what a
codec or a model adds."""

from __future__ import annotations

import numpy as np
import pytest

from tools.train_demo.evaluation import evaluate, held_out_scenes, judge
from tools.train_demo.measure import Video, colour_kept, first_frame_psnr, measure
from tools.train_demo.prompts import ACTIONS, BACKGROUNDS, CAMERAS, FEATURELESS, PANS, Script, Subject
from tools.train_demo.render import render
from tools.train_demo.scenes import FRAMES, Scene, Thing, camera_course, draw_scene

ENOUGH = 0.98
COUNT = 36


def staged(action: str, camera: str = "still", background: str = "brick wall", pattern: str = "") -> Scene:
    """One blue car in the middle of a picture that leaves room for all it may do."""
    subject = Subject("blue", "car", pattern, action)
    script = Script((subject,), background, camera)
    return Scene(script, "", (192, 192), FRAMES, (Thing(subject, 96.0, 96.0, 19.0, 0.0),), 4)


def noisy(video: Video, strength: float) -> Video:
    """Blurred a little and with noise that changes from frame to frame."""
    values = video.astype(np.float32)
    values = (values + np.roll(values, 1, 1) + np.roll(values, 1, 2) + np.roll(values, (1, 1), (1, 2))) / 4
    noise = strength * np.random.default_rng(0).standard_normal(values.shape, dtype=np.float32)
    return np.clip(np.rint(values + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("held_out", [False, True])
def test_rendered_videos_are_measured_right(held_out: bool) -> None:
    drawn = (draw_scene(21, number, held_out) for number in range(2 * COUNT))
    report = evaluate([scene for scene in drawn if scene.script.moves][:COUNT], render)
    wrong = [(result.prompt, result.measured) for result in report.results if not result.right]
    assert report.motion_right >= ENOUGH, wrong
    assert report.colour_kept >= ENOUGH
    assert report.psnr == 100


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_told_apart(action: str) -> None:
    for background in ("plain wall", "starry night"):
        assert measure(render(staged(action, background=background, pattern="striped")), ["blue"]).motion == (
            action,
            "still",
        )


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_is_told_apart(camera: str) -> None:
    actions = ("still", "clockwise", "grow") if camera in PANS else ("still", "clockwise")
    for action in actions:
        assert measure(render(staged(action, camera)), ["blue"]).motion == (action, camera)


def test_noise_and_blur_change_no_word() -> None:
    sample = held_out_scenes(14, seed=22)
    report = evaluate(sample, lambda scene: noisy(render(scene), 5.0))
    assert report.motion_right == 1, [(r.prompt, r.measured) for r in report.results if not r.right]
    assert all(result.flicker > 2 for result in report.results)
    assert report.colour_kept == 1


def worn(video: Video) -> Video:
    """Blurred, ever darker until 30 % of the light is gone, and with noise of 2 levels."""
    values = video.astype(np.float32)
    for axis in (1, 2):
        values = (np.roll(values, 1, axis) + 2 * values + np.roll(values, -1, axis)) / 4
    values *= np.linspace(1, 0.7, len(video), dtype=np.float32)[:, None, None, None]
    values += 2 * np.random.default_rng(0).standard_normal(values.shape, dtype=np.float32)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


TEXTURED = [name for name in BACKGROUNDS if name not in FEATURELESS]


@pytest.mark.parametrize("background", TEXTURED)
def test_the_camera_is_tracked_to_a_pixel(background: str) -> None:
    moving = CAMERAS[1:]
    one = moving[TEXTURED.index(background) % len(moving)]
    for camera in (one, *PANS) if background == "starry night" else (one,):
        truth = camera_course(camera, FRAMES)
        video = render(staged("still", camera, background))
        for shown in (video, worn(video)):
            track = measure(shown, ["blue"]).camera
            np.testing.assert_allclose(track.x, -truth.x * truth.zoom, atol=1, err_msg=camera)
            np.testing.assert_allclose(track.y, -truth.y * truth.zoom, atol=1, err_msg=camera)
            np.testing.assert_allclose(track.zoom, truth.zoom, rtol=0.01, err_msg=camera)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_where_nothing_moves_nothing_is_measured(background: str) -> None:
    repeated = np.repeat(render(staged("still", background=background))[:1], FRAMES, axis=0)
    for shown in (noisy(repeated, 5.0), worn(repeated)):
        measured = measure(shown, ["blue"])
        assert measured.motion == ("still", "still")
        np.testing.assert_allclose((measured.camera.x, measured.camera.y), 0, atol=0.5)
        np.testing.assert_allclose(measured.camera.zoom, 1, atol=0.01)


def test_a_change_of_colour_is_seen() -> None:
    video = render(staged("right"))
    fading = np.linspace(0, 1, FRAMES)[:, None, None, None]
    swapped = video[..., ::-1]  # blue becomes red
    changed = np.rint(video * (1 - fading) + swapped * fading).astype(np.uint8)
    assert colour_kept(measure(video, ["blue"]).objects[0], fades=False)
    assert not colour_kept(measure(changed, ["blue"]).objects[0], fades=False)
    assert judge(staged("fade"), render(staged("fade"))).colour_kept


def test_an_object_that_is_not_there_is_lost() -> None:
    measured = measure(render(staged("right")), ["yellow"])
    assert measured.motion == ("lost", "still")
    assert not any(colour_kept(measured.objects[0], fades) for fades in (False, True))


def test_pictures_that_tell_no_motion_stand_still() -> None:
    black = np.zeros((9, 64, 64, 3), np.uint8)
    stripes = black.copy()
    stripes[:, :, ::8], stripes[:, :, 1::8] = 200, 200  # nothing shows a shift along them
    for video in (black, stripes):
        assert measure(video, ["blue"]).motion == ("lost", "still")


def test_tracks_are_what_was_drawn() -> None:
    measured = measure(render(staged("right", background="plain wall")), ["blue"])
    track = measured.objects[0]
    assert track.x[-1] - track.x[0] == pytest.approx(40, abs=0.7)
    assert np.ptp(track.y) < 0.5
    turned = measure(render(staged("counterclockwise")), ["blue"]).objects[0]
    assert turned.angle[-1] == pytest.approx(-np.pi, abs=0.05)
    grown = measure(render(staged("grow")), ["blue"]).objects[0]
    assert grown.size[-1] / grown.size[0] == pytest.approx(1.7, abs=0.06)
    panned = measure(render(staged("still", "pan left")), ["blue"]).camera
    assert panned.x[-1] == pytest.approx(36, abs=0.5)
    zoomed = measure(render(staged("still", "zoom in")), ["blue"]).camera
    assert zoomed.zoom[-1] == pytest.approx(1.4, abs=0.01)


def test_the_first_frame_is_compared() -> None:
    video = render(staged("up"))
    assert first_frame_psnr(video, video[0]) == np.inf
    off = np.clip(video[0].astype(int) + 10, 0, 255).astype(np.uint8)
    assert first_frame_psnr(video, off) == pytest.approx(28.1, abs=0.5)


def test_two_frames_show_no_motion() -> None:
    with pytest.raises(ValueError, match="no motion"):
        measure(render(staged("still"))[:2], ["blue"])
