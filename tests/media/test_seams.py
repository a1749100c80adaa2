"""The seam measure: planted steps and fades of known height are found where they are, and nothing where there are none.

The pictures move, have noise and the pattern of 8 pixels that decoders leave.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_i2v.compare import compare_frames, compare_videos, luma
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.seams import Tiles, seam_lines, seams_of
from lowvram_i2v.video import write_video

TILES = Tiles(128, 32)  # fades of 32 pixels and 8 frames
WIDTH, HEIGHT, FRAMES = 288, 224, 57


@functools.cache
def waves(width=WIDTH, height=HEIGHT, frames=FRAMES, seed=0):
    """Planes of brightness: slow waves that move, noise of one level, a pattern of period 8."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    pattern = np.kron(np.ones((height // 8 + 1, width // 8 + 1)), random.normal(0, 2, (8, 8)))[:height, :width]
    planes = []
    for frame in range(frames):
        plane = 120 + 40 * np.sin(rows / 90 + frame / 30) + 30 * np.cos(columns / 80 - frame / 25)
        planes.append((plane + pattern + random.normal(0, 1, plane.shape)).astype(np.float32))
    return planes


def ramp(extent, start, fade):
    """0 before `start`, 1 after the fade."""
    return np.clip((np.arange(extent) - start + (fade == 0)) / max(fade, 1), 0, 1)


def planted(axis, start, fade, height):
    """The waves, brighter by `height` levels after a border."""
    over = {"rows": ramp(HEIGHT, start, fade)[:, None], "columns": ramp(WIDTH, start, fade)[None]}
    for frame, plane in enumerate(waves()):
        more = ramp(FRAMES, start, fade)[frame] if axis == "frames" else over[axis]
        yield (plane + height * more).astype(np.float32)


def by_name(seams):
    return {(seam.axis, seam.kind): seam for seam in seams}


def test_without_seams_borders_are_like_the_rest():
    seams = seams_of(waves(), TILES)
    assert set(by_name(seams)) == {(a, k) for a in ("columns", "rows", "frames") for k in ("step", "bend")}
    for seam in seams:
        assert 0.6 < seam.mean < 1.5, seam.text()
        assert not seam.stands_out, seam.text()
        assert {line % 4 for line, _ in seam.interior} == ({1} if seam.axis == "frames" else {0})


@settings(max_examples=12)
@given(axis=st.sampled_from(["rows", "columns", "frames"]), number=st.integers(0, 1), height=st.floats(2, 9))
def test_a_planted_step_is_found_with_its_height_and_place(axis, number, height):
    starts = (25, 33) if axis == "frames" else (96, 128)
    found = by_name(seams_of(planted(axis, starts[number], 0, height), TILES))
    seam = found[axis, "step"]
    assert seam.worst == starts[number]
    assert seam.height == pytest.approx(height, rel=0.15)
    assert seam.stands_out
    assert seam.most > 2 * seam.most_inside
    for other in found.values():
        if other.axis != axis:
            assert other.most < 1.3 * other.limit, other.text()


@pytest.mark.parametrize(("axis", "start", "fade"), [("rows", 96, 32), ("columns", 192, 32), ("frames", 25, 8)])
def test_a_planted_fade_bends_where_it_begins_and_ends(axis, start, fade):
    found = by_name(seams_of(planted(axis, start, fade, 12), TILES))
    seam = found[axis, "bend"]
    assert seam.worst in (start, start + fade)
    assert seam.height == pytest.approx(12 / 8, rel=0.25)
    assert seam.most > 2 * seam.most_inside
    shown = sorted(seam.borders, key=lambda border: -border[1])[:2]
    assert {line for line, _ in shown} == {start, start + fade}
    assert found[axis, "step"].height < 12 / fade


def test_a_seam_between_borders_is_the_picture_s_own():
    seam = by_name(seams_of(planted("columns", 160, 0, 6), TILES))["columns", "step"]
    assert seam.worst != 160
    assert seam.most < seam.most_inside
    assert max(seam.interior, key=lambda line: line[1])[0] == 160


def test_borders_are_where_the_released_tiles_fade():
    def fades(*size):
        return [list(place.fades) for place in Tiles().places(*size)]

    assert fades(1280, 720, 129) == [
        [(192 * k, 192 * k + 64) for k in range(1, 7)],
        [(192, 256), (384, 448), (576, 640)],
        [(49, 65), (97, 113)],
    ]
    assert fades(256, 256, 61) == [[], [], []]
    assert fades(300, 200, 65) == [[(192, 256)], [(192, 200)], [(49, 65)]]
    assert [place.reach for place in Tiles().places(1, 1, 1)] == [8, 8, 2]


@settings(max_examples=20)
@given(width=st.integers(1, 90), height=st.integers(1, 90), frames=st.integers(1, 21), tile=st.integers(16, 40))
def test_every_size_can_be_measured(width, height, frames, tile):
    for seam in seams_of(waves(width, height, frames), Tiles(tile, 16)):
        extent = {"columns": width, "rows": height, "frames": frames}[seam.axis]
        assert all(0 < line < extent for line, _ in (*seam.borders, *seam.interior))
        assert np.isfinite([seam.mean, seam.most, seam.most_inside, seam.height]).all()
        assert not {line for line, _ in seam.borders} & {line for line, _ in seam.interior}


def test_no_frames_and_flat_frames_have_no_seams():
    assert seams_of([], TILES) == []
    flat = seams_of([np.full((160, 208), 90, np.float32)] * 50, TILES)
    assert all(seam.most == 0 and seam.height == 0 and not seam.stands_out for seam in flat)
    assert len(seam_lines("a", flat)) == 3


def test_a_photo_keeps_its_seam_through_an_mp4(tmp_path):
    """Tiles 8 levels apart, faded: in b - a, where the photo's own edges cancel, they are all there is."""
    wide = np.asarray(draw_sample_photo(640, 256))
    frames = [wide[:, 2 * index : 2 * index + 512] for index in range(9)]
    more = 8 * ramp(512, 384, 64)[None, :, None]
    brighter = [np.clip(np.rint(frame + more), 0, 255).astype(np.uint8) for frame in frames]
    for name, made in (("a", frames), ("b", brighter)):
        write_video(made, tmp_path / f"{name}.mp4", 24, {})
    result = compare_videos(tmp_path / "a.mp4", tmp_path / "b.mp4")
    of = {name: by_name(seams) for name, seams in result.seams.items()}
    assert of["a"]["columns", "step"].most < 1.3 * of["a"]["columns", "step"].most_inside
    apart = of["b - a"]["columns", "bend"]
    assert apart.worst in (384, 448)
    assert apart.height == pytest.approx(8 / 8, rel=0.25)
    assert apart.most > 3 * apart.most_inside
    lines = [line for line in result.lines() if line.startswith("seams of")]
    assert [line.split(": ")[0] for line in lines] == [
        f"seams of {name}, {axis}" for name in ("a", "b", "b - a") for axis in ("columns", "rows")
    ]


def test_frames_are_measured_as_their_brightness():
    frames = [np.clip(plane, 0, 255).astype(np.uint8)[..., None].repeat(3, 2) for plane in waves(frames=33)]
    seams = compare_frames(frames, frames, TILES).seams
    assert seams["a"] == seams["b"] == seams_of(map(luma, frames), TILES)
    assert all(seam.most == 0 for seam in seams["b - a"])
