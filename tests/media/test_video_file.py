"""The mp4: exact count and size, colours, settings inside it, and nothing left behind when anything fails."""

import shutil
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple

import imageio_ffmpeg
import numpy as np
import pytest

from lowvram_i2v import video
from lowvram_i2v.errors import PlatformError, RequestError, ResourceError
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.video import check_output, read_settings, settings_path, to_uint8, write_video

SETTINGS = {"prompt": "a cat", "seed": 3, "about": {"version": "0"}}


def smooth_frames(count, width, height):
    """Frames of slowly moving colour waves: smooth content, which 4:2:0 keeps."""
    x, y = np.meshgrid(np.arange(width) / 64, np.arange(height) / 64)
    for index in range(count):
        waves = [np.sin(x + 0.1 * index), np.cos(y - 0.07 * index), np.sin(x + y + 0.05 * index)]
        yield to_uint8(np.stack(waves, -1) * 0.4 + 0.5)


def decode(path):
    reader = imageio_ffmpeg.read_frames(str(path), output_params=["-vf", "scale=in_color_matrix=bt709"])
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def psnr(actual, expected):
    error = np.mean((actual.astype(float) - expected.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(
    ("count", "width", "height", "fps"),
    [(1, 64, 48, 24), (5, 160, 96, 12), (33, 176, 368, 24), (61, 64, 64, 30)],
)
def test_count_size_and_rate_are_exact_and_frames_survive(tmp_path, count, width, height, fps):
    frames = list(smooth_frames(count, width, height))
    path = tmp_path / "out.mp4"
    assert write_video(iter(frames), path, fps, SETTINGS) == count
    counted, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert counted == count
    assert seconds == pytest.approx(count / fps, abs=0.02)
    decoded = decode(path)
    assert len(decoded) == count
    assert decoded[0].shape == (height, width, 3)
    assert min(psnr(a, b) for a, b in zip(decoded, frames, strict=True)) > 35
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]


def test_the_stream_is_h264_yuv420p_tagged_bt709_and_starts_fast(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(smooth_frames(5, 64, 48), path, 24, SETTINGS)
    run = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True, check=False)
    (line,) = [line for line in run.stderr.splitlines() if "Video:" in line]
    assert all(word in line for word in ("h264", "yuv420p(tv, bt709", "64x48", "24 fps"))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (18, 180, 90)])
def test_flat_colours_come_back(tmp_path, colour):
    path = tmp_path / "flat.mp4"
    frame = np.full((48, 64, 3), colour, np.uint8)
    write_video([frame] * 5, path, 24, SETTINGS)
    assert np.abs(decode(path)[2].astype(int) - frame).max() <= 4


def test_a_photo_comes_back(tmp_path):
    frame = np.asarray(draw_sample_photo(192, 128))
    write_video([frame] * 5, tmp_path / "photo.mp4", 24, SETTINGS)
    assert min(psnr(got, frame) for got in decode(tmp_path / "photo.mp4")) > 30


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "plain",
        "line\nbreak\r\nand\ttab\n\n",
        "a=b; c#d \\ \\\\ back\\nslash ;; [chapter] 'quoted' \"double\"",
        "Ünïcödé 猫が走る 🐈‍⬛ \u2028 \x00 \x7f",
        ";FFMETADATA1\ntitle=x\n",
        "long " * 60_000,
        "a path that is no Unicode: caf\udce9",
    ],
)
def test_settings_survive_in_the_mp4_itself_and_beside_it(tmp_path, prompt):
    path = tmp_path / "out.mp4"
    settings = {**SETTINGS, "prompt": prompt, "size": [64, 48], "guidance": None, "cfg": 1.5}
    write_video(smooth_frames(1, 64, 48), path, 24, settings)
    assert read_settings(settings_path(path)) == settings
    settings_path(path).unlink()
    assert read_settings(path) == settings


def test_settings_fall_back_to_the_json_and_are_refused_where_there_are_none(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(smooth_frames(1, 64, 48), path, 24, SETTINGS)
    stripped = tmp_path / "stripped.mp4"
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        path,
        "-map_metadata",
        "-1",
        "-c",
        "copy",
        stripped,
    ]
    subprocess.run(command, check=True)
    with pytest.raises(RequestError, match="no settings"):
        read_settings(stripped)
    shutil.copy(settings_path(path), settings_path(stripped))
    assert read_settings(stripped) == SETTINGS
    other = tmp_path / "other.mp4"
    subprocess.run([*command[:-3], "-metadata", "comment=hello", "-c", "copy", other], check=True)
    with pytest.raises(RequestError, match="no settings"):
        read_settings(other)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(RequestError, match="no settings"):
        read_settings(tmp_path / "text.mp4")
    with pytest.raises(RequestError, match="not a file"):
        read_settings(tmp_path / "none.mp4")


def test_as_many_frames_as_may_wait_are_held(tmp_path, monkeypatch):
    """Those that wait, the one that comes and the one that is made: nothing collects the iterator."""
    monkeypatch.setattr(video, "AHEAD", 4)
    alive = []

    class Counted(np.ndarray):
        def __del__(self):
            alive.pop()

    def frames():
        for frame in smooth_frames(20, 64, 48):
            alive.append(1)
            yield frame.view(Counted)
            assert len(alive) <= 4 + 2

    assert write_video(frames(), tmp_path / "out.mp4", 24, SETTINGS) == 20


def test_a_slow_encoder_holds_nobody_up_until_all_places_are_taken(tmp_path, monkeypatch):
    """An encoder that reads nothing until the frames have stopped coming."""
    taken, stopped_at, told = [], [], tmp_path / "told"
    script = f"""import pathlib, sys, time
while not pathlib.Path({str(told)!r}).exists():
    time.sleep(0.02)
pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"""
    monkeypatch.setattr(video, "_command", lambda path, *_: [sys.executable, "-c", script, str(path)])
    monkeypatch.setattr(video, "AHEAD", 8)
    frame = np.zeros((480, 640, 3), np.uint8)  # more than a pipe holds

    def frames():
        for _ in range(40):
            taken.append(1)
            yield frame

    def watch():
        before = -1
        while before != len(taken):
            before = len(taken)
            time.sleep(0.5)
        stopped_at.append(before)
        told.touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert write_video(frames(), tmp_path / "out.mp4", 24, SETTINGS) == 40
    watcher.join()
    assert stopped_at == [8 + 1]
    assert (tmp_path / "out.mp4").read_bytes() == frame.tobytes() * 40


def test_numbers_are_rounded_on_their_way(tmp_path):
    """Planes of float32, as a decoder makes them, give the bytes that rounding them by hand gives."""
    planes = np.random.default_rng(0).uniform(-0.2, 1.2, (3, 5, 48, 64)).astype(np.float32)
    frames = planes.transpose(1, 2, 3, 0)
    write_video(iter(frames), tmp_path / "numbers.mp4", 24, SETTINGS)
    write_video(iter(to_uint8(np.ascontiguousarray(frames))), tmp_path / "bytes.mp4", 24, SETTINGS)
    assert (tmp_path / "numbers.mp4").read_bytes() == (tmp_path / "bytes.mp4").read_bytes()
    planes[1, 3, 20, 20] = np.nan
    with pytest.raises(PlatformError, match="not numbers"):
        write_video(iter(frames), tmp_path / "nan.mp4", 24, SETTINGS)
    assert not (tmp_path / "nan.mp4").exists()


@pytest.mark.parametrize("error", [RuntimeError("decode failed"), KeyboardInterrupt()])
def test_a_failing_iterator_leaves_nothing_and_no_process(tmp_path, monkeypatch, error):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(video.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def frames():
        yield from smooth_frames(3, 64, 48)
        raise error

    with pytest.raises(type(error)):
        write_video(frames(), tmp_path / "out.mp4", 24, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert len(started) == 1
    assert started[0].returncode is not None


def test_a_failed_run_keeps_the_video_that_was_there(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(smooth_frames(5, 64, 48), path, 24, SETTINGS)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def frames():
        yield from smooth_frames(2, 64, 48)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_video(frames(), path, 24, {"other": 1})
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    write_video(smooth_frames(9, 64, 48), path, 24, {"other": 1})
    assert len(decode(path)) == 9
    assert read_settings(path) == {"other": 1}


def test_the_same_frames_make_the_same_bytes_with_ordinary_permissions(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(smooth_frames(9, 64, 48), tmp_path / name, 24, SETTINGS)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.mp4", "a.mp4.json", "plain")}
    assert len(modes) == 1


def test_wrong_frames_are_bugs_and_leave_nothing(tmp_path):
    good = next(smooth_frames(1, 64, 48))
    for frames in ([], [good, good[:32]], [good.astype(np.float64)], [good, good[..., :2]]):
        with pytest.raises(ValueError, match="frame"):
            write_video(frames, tmp_path / "out.mp4", 24, SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_ffmpeg_tells_its_last_lines_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(PlatformError, match="not divisible by 2"):
        write_video([np.zeros((49, 65, 3), np.uint8)] * 3, tmp_path / "odd.mp4", 24, SETTINGS)
    broken = tmp_path / "bin" / "ffmpeg"
    broken.parent.mkdir()
    broken.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write('No space left on device')\nsys.exit(5)\n")
    broken.chmod(0o755)
    monkeypatch.setattr(video, "_ffmpeg", lambda: str(broken))
    with pytest.raises(ResourceError, match="status 5"):
        write_video(smooth_frames(200, 640, 480), tmp_path / "out.mp4", 24, SETTINGS)
    broken.write_text(f"#!{sys.executable}\nimport os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(ResourceError, match="by signal 9") as caught:
        write_video(smooth_frames(200, 640, 480), tmp_path / "out.mp4", 24, SETTINGS)
    assert "RAM" in caught.value.remedy
    broken.chmod(0o644)
    with pytest.raises(PlatformError, match="does not start"):
        write_video(smooth_frames(2, 64, 48), tmp_path / "out.mp4", 24, SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bin"]


def test_odd_names_are_written_and_read(tmp_path):
    for name in ("-dash.mp4", "sp ace & %03d 'q'.mp4", "ünï: 猫.MP4"):
        check_output(tmp_path / name, 64, 48, 1)
        write_video(smooth_frames(1, 64, 48), tmp_path / name, 24, SETTINGS)
        settings_path(tmp_path / name).unlink()
        assert read_settings(tmp_path / name) == SETTINGS


def test_a_relative_name_lands_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = video.Path("out.mp4")
    check_output(path, 64, 48, 1)
    write_video(smooth_frames(1, 64, 48), path, 24, SETTINGS)
    assert (tmp_path / "out.mp4").is_file()


def test_check_output_accepts_a_good_name_and_leaves_nothing(tmp_path):
    check_output(tmp_path / "out.mp4", 1280, 720, 129)
    assert list(tmp_path.iterdir()) == []


def test_check_output_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken.mp4.json").mkdir()
    (tmp_path / "file").touch()
    bad = {
        "out.avi": "does not end in .mp4",
        "out": "does not end in .mp4",
        "folder.mp4": "is a folder",
        "taken.mp4": "is a folder",
        "none/out.mp4": "does not exist",
        "file/out.mp4": "does not exist",
        "x" * 250 + ".mp4": "cannot be written",
        "nul\0.mp4": "cannot be written",
    }
    for name, words in bad.items():
        with pytest.raises(RequestError, match=words) as error:
            check_output(tmp_path / name, 64, 48, 5)
        assert error.value.remedy
    assert len(list(tmp_path.iterdir())) == 3


def test_check_output_refuses_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    def denied(**options):
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(video.tempfile, "TemporaryFile", denied)
    with pytest.raises(RequestError, match="Permission denied"):
        check_output(tmp_path / "out.mp4", 64, 48, 5)


def test_check_output_refuses_a_full_disk_with_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(video.shutil, "disk_usage", lambda folder: usage(1 << 40, 1 << 40, 5 << 20))
    with pytest.raises(ResourceError, match="5 MiB free; 129 frames of 1280x720 may need 54 MiB"):
        check_output(tmp_path / "out.mp4", 1280, 720, 129)


def test_check_output_asks_for_ffmpeg(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(PlatformError, match="pip install"):
        check_output(tmp_path / "out.mp4", 64, 48, 5)


def test_rounding_to_eight_bits():
    values = np.array([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 0.9999, 1.0, 3.0], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    exact = np.arange(256, dtype=np.float32) / 255
    np.testing.assert_array_equal(to_uint8(exact), np.arange(256))
    with pytest.raises(PlatformError, match="not numbers"):
        to_uint8(np.array([0.5, np.nan], np.float32))
