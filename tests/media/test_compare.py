"""Comparing videos: against scikit-image, on differences made to measure, and from mp4 to the printed lines."""

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lowvram_i2v.compare import (
    block_means,
    compare_frames,
    compare_videos,
    luma,
    read_frames,
    ssim,
)
from lowvram_i2v.errors import RequestError
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.video import write_video


def photo(width=96, height=64, seed=0):
    return np.asarray(draw_sample_photo(width, height, seed))


def clip(count=6, width=96, height=64):
    """A camera that moves over the photo."""
    wide = photo(width + 4 * count, height)
    return [wide[:, 4 * index : 4 * index + width] for index in range(count)]


def noisy(frame, amount, seed=0):
    noise = np.random.default_rng(seed).integers(-amount, amount + 1, frame.shape)
    return np.clip(frame.astype(int) + noise, 0, 255).astype(np.uint8)


@settings(max_examples=30)
@given(width=st.integers(11, 70), height=st.integers(11, 70), amount=st.integers(0, 255), seed=st.integers(0, 9))
def test_psnr_and_ssim_are_those_of_scikit_image(width, height, amount, seed):
    a = photo(width, height, seed)
    b = noisy(a, amount, seed)
    expected = structural_similarity(
        luma(a).astype(np.float64),
        luma(b).astype(np.float64),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(luma(a), luma(b)) == pytest.approx(expected, abs=2e-5)
    with np.errstate(divide="ignore"):
        assert compare_frames([a], [b]).psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)


def test_flat_planes_do_not_upset_ssim():
    for level in (0, 128, 255):
        flat = np.full((40, 50), level, np.float32)
        assert ssim(flat, flat) == pytest.approx(1, abs=1e-5)
    black, white = np.zeros((40, 50), np.float32), np.full((40, 50), 255, np.float32)
    assert ssim(black, white) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="smaller than"):
        ssim(black[:10], black[:10])


def test_equal_videos_differ_in_nothing():
    frames = clip()
    result = compare_frames(frames, iter(frames))
    assert result.psnr == np.inf
    assert result.ssim == pytest.approx(1, abs=1e-6)
    assert result.brightness_rms == result.brightness_max == 0
    assert [frame.jump_a for frame in result.frames] == [frame.jump_b for frame in result.frames]
    assert (result.width, result.height, len(result.frames)) == (96, 64, 6)


def test_all_frames_count_together_in_psnr():
    a = [np.zeros((16, 16, 3), np.uint8)] * 2
    b = [a[0], np.full((16, 16, 3), 10, np.uint8)]
    result = compare_frames(a, b)
    assert result.psnr == pytest.approx(10 * np.log10(255**2 / 50))
    assert result.frames[0].psnr == np.inf
    assert result.worst(lambda frame: frame.squared) == 1


@given(height=st.integers(1, 70), width=st.integers(1, 70), block=st.integers(1, 40))
def test_block_means_are_the_means_of_the_blocks(height, width, block):
    plane = np.random.default_rng(0).normal(size=(height, width)).astype(np.float32)
    means = block_means(plane, block)
    expected = [
        [plane[y : y + block, x : x + block].mean(dtype=np.float64) for x in range(0, width, block)]
        for y in range(0, height, block)
    ]
    np.testing.assert_allclose(means, expected, atol=1e-6)


def test_a_brighter_block_is_found_and_noise_is_not():
    a = [np.full((96, 128, 3), 100, np.uint8)] * 3
    brighter = [frame.copy() for frame in a]
    brighter[2][32:64, 64:96] += 6
    result = compare_frames(a, brighter)
    assert result.brightness_max == pytest.approx(6, abs=1e-4)
    assert result.brightness_rms == pytest.approx(np.sqrt(36 / (3 * 12)), abs=1e-4)
    assert result.worst(lambda frame: frame.brightness_max) == 2
    noise = compare_frames(a, [noisy(frame, 6) for frame in a])
    assert noise.psnr < result.psnr
    assert noise.brightness_max < 1


def test_a_stutter_shows_in_the_jumps():
    a = clip(12)
    b = list(a)
    b[7] = b[6]  # one frame stands still, the next one moves twice
    result = compare_frames(a, b)
    jumps = [frame.jump_b for frame in result.frames]
    assert jumps[0] == jumps[7] == 0
    assert result.worst(lambda frame: frame.jump_b - frame.jump_a) == 8
    assert jumps[8] > 1.3 * result.frames[8].jump_a
    step = np.abs(a[3].astype(float) - a[2]).mean()
    assert result.frames[3].jump_a == pytest.approx(step)


def test_unequal_videos_are_errors():
    frames = clip()
    for a, b, words in (
        (frames, frames[:4], "b ends after 4 frames"),
        (frames[:3], frames, "a ends after 3 frames"),
        (frames, [frame[:48] for frame in frames], "96x64 and 96x48"),
        ([], [], "no frames"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_frames(a, b)


def test_frames_are_taken_one_pair_at_a_time():
    taken = []

    def frames(name):
        for frame in clip():
            taken.append(name)
            yield frame

    compare_frames(frames("a"), frames("b"))
    assert "".join(taken) == "ab" * 6


def test_mp4_files_from_the_first_to_the_last_frame(tmp_path):
    frames = clip(9)
    write_video(frames, tmp_path / "a.mp4", 24, {})
    write_video([noisy(frame, 12) for frame in frames], tmp_path / "- %03d b.mp4", 24, {})
    decoded = list(read_frames(tmp_path / "a.mp4"))
    assert len(decoded) == 9
    assert min(peak_signal_noise_ratio(a, b) for a, b in zip(frames, decoded, strict=True)) > 28
    same = compare_videos(tmp_path / "a.mp4", tmp_path / "a.mp4")
    assert same.psnr == np.inf
    other = compare_videos(tmp_path / "a.mp4", tmp_path / "- %03d b.mp4")
    assert 20 < other.psnr < 45
    assert len(other.lines()) == 7
    assert len(other.table()) == 10
    assert other.table()[0].startswith("frame\tpsnr")
    assert all(len(line.split("\t")) == 7 for line in other.table())


def test_one_frame_has_no_jumps(tmp_path):
    write_video(clip(1), tmp_path / "a.mp4", 24, {})
    lines = compare_videos(tmp_path / "a.mp4", tmp_path / "a.mp4").lines()
    assert len(lines) == 4
    assert "inf dB" in lines[1]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (18, 180, 90)])
def test_colours_are_read_by_the_matrix_that_the_file_names(tmp_path, colour):
    frame = np.full((48, 64, 3), colour, np.uint8)
    write_video([frame] * 3, tmp_path / "a.mp4", 24, {})
    assert np.abs(list(read_frames(tmp_path / "a.mp4"))[1].astype(int) - frame).max() <= 4


def test_files_that_cannot_be_compared_are_refused(tmp_path):
    write_video(clip(5), tmp_path / "a.mp4", 24, {})
    write_video(clip(3), tmp_path / "short.mp4", 24, {})
    write_video(clip(5, 64, 48), tmp_path / "small.mp4", 24, {})
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    for name, words in {
        "short.mp4": "b ends after 3 frames",
        "small.mp4": "96x64 and 64x48",
        "text.mp4": "cannot be read as a video",
        "cut.mp4": "cannot be read as a video",
        "none.mp4": "is not a file",
    }.items():
        with pytest.raises(RequestError, match=words) as error:
            compare_videos(tmp_path / "a.mp4", tmp_path / name)
        assert error.value.remedy


def test_an_iterator_that_is_closed_ends_the_reader(tmp_path, monkeypatch):
    write_video(clip(60), tmp_path / "a.mp4", 24, {})
    closed = []
    real = imageio_ffmpeg.read_frames

    def watched(*args, **options):
        reader = real(*args, **options)
        try:
            yield from reader
        finally:
            reader.close()
            closed.append(True)

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", watched)
    frames = read_frames(tmp_path / "a.mp4")
    next(frames)
    frames.close()
    assert closed == [True]
