"""The demo model that ships: `--model demo`, the default, `lowvram-i2v demo`, what the package carries, and its quality
on a few held-out scenes."""

from __future__ import annotations

import gc
import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from lowvram_i2v import cli, demo_model
from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.compare import psnr, read_frames
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import ignore
from lowvram_i2v.pipeline import generate
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.video import read_settings, write_video
from tools import ship_demo
from tools.attention_stand_in import attend
from tools.demo_table import frames_of
from tools.train_demo import scenes
from tools.train_demo.evaluation import judge
from tools.train_demo.render import render
from tools.train_demo.sizes import DEMO, MOST_BYTES

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "2", "--frames", "5", "--device", "cpu")


SHIPPED = demo_model.shipped()
HELD_OUT = [scenes.draw_scene(0, number, held_out=True, size=(128, 128)) for number in range(3)]


@pytest.fixture(autouse=True, scope="module")
def libraries_are_not_garbage() -> Iterator[None]:
    """Each phase of a run collects; looking through the libraries takes longer than most phases here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 100)).convert("RGB").save(path)
    return path


def test_its_name_and_its_place_anywhere_mean_it() -> None:
    for named in ("demo", "/elsewhere/lowvram_i2v/demo_weights"):
        assert demo_model.is_demo(demo_model.model_path(named))
    assert demo_model.model_path("other") == Path("other")
    assert not demo_model.is_demo(Path("demo"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GenerateRequest, Path]]:
    """In place of every run: the requests and the model folders."""
    from lowvram_i2v import demo, pipeline

    calls: list[tuple[GenerateRequest, Path]] = []

    def generate(request: GenerateRequest, folder: Path, *_: object) -> Path:
        calls.append((request, folder))
        return request.output

    for module in (pipeline, demo):
        monkeypatch.setattr(module, "generate", generate)
    return calls


def test_it_is_the_default_and_a_video_of_it_can_be_repeated(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out.mp4"
    flags = ["generate", "--image", str(photo), "--prompt", "A red square moves left.", "--output", str(out)]
    assert cli.main([*flags, *SHORT, "--size", "32x48"]) == 0
    assert "knows drawn shapes" in capsys.readouterr().err
    assert next(imageio_ffmpeg.read_frames(str(out)))["size"] == (32, 48)

    asked = request.getfixturevalue("asked")
    wide = tmp_path / "wide.png"
    Image.open(photo).resize((200, 100)).save(wide)
    repeat = ["generate", "--like", str(out), "--output", str(tmp_path / "again.mp4"), "--device", "cpu"]
    assert cli.main(repeat) == 0
    assert cli.main([*repeat, "--image", str(wide)]) == 0
    assert [(one.size, one.frames) for one, _ in asked] == [((32, 48), 5), ((192, 128), 5)]
    assert {folder for _, folder in asked} == {SHIPPED}


def test_a_video_that_names_no_model_is_not_repeated_with_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = GenerateRequest(tmp_path / "photo.png", "x", tmp_path / "out.mp4").to_settings()
    write_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "out.mp4", 24, settings)
    assert cli.main(["generate", "--like", str(tmp_path / "out.mp4"), "--output", str(tmp_path / "again.mp4")]) == 1
    assert "--model not given" in capsys.readouterr().err


def test_what_it_knows_is_the_default_and_flags_win(
    photo: Path, tmp_path: Path, asked: list[tuple[GenerateRequest, Path]]
) -> None:
    flags = ["generate", "--image", str(photo), "--prompt", "x", "--output", str(tmp_path / "o.mp4"), "--device", "cpu"]
    assert cli.main([*flags, "--model", "demo"]) == 0
    assert cli.main([*flags, "--resolution", "360p", "--frames", "9", "--steps", "3"]) == 0
    assert cli.main([*flags, "--size", "64x64"]) == 0
    assert cli.main([*flags, "--model", "another"]) == 0
    assert [folder for _, folder in asked] == [SHIPPED, SHIPPED, SHIPPED, Path("another")]
    settings = [(request.size, request.resolution, request.frames, request.steps) for request, _ in asked]
    assert settings == [
        ((128, 192), "720p", demo_model.FRAMES, demo_model.STEPS),
        (None, "360p", 9, 3),
        ((64, 64), "720p", demo_model.FRAMES, demo_model.STEPS),
        (None, "720p", 129, 50),
    ]


def test_the_demo_animates_its_picture_and_writes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_i2v import demo

    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "FRAMES", 5)
    before = {path: path.stat().st_mtime_ns for path in SHIPPED.parent.rglob("*")}
    out = tmp_path / "new" / "out"
    assert cli.main(["demo", "--folder", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "demo.mp4")
    assert {path.name for path in out.iterdir()} == {"demo.mp4", "demo.mp4.json", demo_model.PICTURE}
    settings = read_settings(out / "demo.mp4")
    assert (settings["prompt"], settings["size"], settings["frames"]) == (demo_model.PROMPT, [192, 128], 5)
    assert {path: path.stat().st_mtime_ns for path in SHIPPED.parent.rglob("*")} == before


def test_a_picture_of_ones_own_needs_a_prompt(
    photo: Path, tmp_path: Path, asked: list[tuple[GenerateRequest, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["demo", "--folder", str(tmp_path / "out"), "--device", "cpu", "--image", str(photo)]
    assert cli.main(flags) == 1
    assert "--prompt" in capsys.readouterr().err
    assert cli.main([*flags, "--prompt", "A car moves up."]) == 0
    assert "knows drawn shapes" in capsys.readouterr().err
    ((request, _),) = asked
    assert (request.image, request.prompt, request.size) == (photo, "A car moves up.", (128, 192))
    assert cli.main(["demo", "--folder", str(photo)]) == 1
    assert "cannot be made" in capsys.readouterr().err


def test_the_table_sees_the_frames_that_the_file_gets(photo: Path, tmp_path: Path) -> None:
    """`tools.demo_table` runs the same phases; what cannot run here is refused, never replaced."""
    cpu, profile = torch.device("cpu"), load_profile("auto")
    request = GenerateRequest(photo, "A red square moves left.", tmp_path / "o.mp4", size=(32, 48), frames=5, steps=2)
    frames = frames_of(request, SHIPPED, profile, cpu)
    assert frames.shape == (5, 48, 32, 3)
    with closing(read_frames(generate(request, SHIPPED, profile, cpu, ignore))) as written:
        assert np.abs(np.stack(list(written)).astype(int) - frames).mean() < 12  # H.264, colours at half the size
    eight_bit = frames_of(request, SHIPPED, profile, cpu, stand_in=attend)
    assert not np.array_equal(eight_bit, frames)
    assert np.abs(eight_bit.astype(int) - frames).max() < 40
    with pytest.raises(RequestError, match="cannot run here"):
        frames_of(request, SHIPPED, replace(profile, attention="triton-int8"), cpu)


def test_sizes_and_frames_are_those_of_the_training(photo: Path, tmp_path: Path) -> None:
    assert set(demo_model.SIZES) == set(DEMO.clip_sizes) == set(scenes.SIZES)
    assert demo_model.FRAMES == scenes.FRAMES
    assert demo_model.MOST_BYTES == MOST_BYTES
    assert demo_model.size_for(photo) == (128, 192)
    for width, height, size in ((100, 100, (128, 128)), (119, 100, (128, 128)), (130, 100, (192, 128))):
        path = tmp_path / "picture.png"
        Image.new("RGB", (width, height)).save(path)
        assert demo_model.size_for(path) == size


def test_the_picture_is_what_the_code_draws() -> None:
    scene = ship_demo.picture_scene()
    assert scene.script.subjects[0].held_out
    shipped = np.asarray(Image.open(demo_model.package_file(demo_model.PICTURE)).convert("RGB"))
    assert np.array_equal(shipped, render(scene)[0])


def test_what_cannot_ship_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "files", lambda _: tmp_path)  # in place of the package
    other, target = tmp_path / "model-bf16", tmp_path / demo_model.FOLDER
    shutil.copytree(SHIPPED, other)
    ship_demo.main(["--picture"])
    ship_demo.place(other, target)
    assert open_model(target).header.scheme == "int8"
    records = json.loads((other / "model.json").read_text())
    records["components"]["transformer"]["scheme"] = "bf16"
    (other / "model.json").write_text(json.dumps(records))
    assert ship_demo.main([str(other)]) == 1
    assert "is bf16" in capsys.readouterr().err
    assert ship_demo.main([str(tmp_path)]) == 1
    assert "model.json" in capsys.readouterr().err
    monkeypatch.setattr(ship_demo, "MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000"):
        ship_demo.place(SHIPPED, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_wheel_contains_picture_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setuptools copies of this tree."""
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution(
        {
            "name": "lowvram-i2v",
            "script_name": "setup.py",
            "packages": ["lowvram_i2v"],
            "package_dir": settings["package-dir"],
            "package_data": settings["package-data"],
        }
    )
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path / "lib")
    build.ensure_finalized()
    build.run()
    built = tmp_path / "lib" / "lowvram_i2v"
    assert (built / demo_model.PICTURE).is_file()
    assert open_model(built / demo_model.FOLDER).header.scheme == "int8"
    copied = built / demo_model.FOLDER
    assert names_in(copied) == names_in(SHIPPED)


def names_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_what_ships_is_small_enough() -> None:
    files = [demo_model.package_file(demo_model.PICTURE), *SHIPPED.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= MOST_BYTES


def test_held_out_scenes_move_as_their_prompts_say(tmp_path: Path) -> None:
    cpu, profile = torch.device("cpu"), load_profile("auto")
    for number, scene in enumerate(HELD_OUT):
        Image.fromarray(render(scene)[0]).save(tmp_path / "picture.png")
        request = GenerateRequest(
            *(tmp_path / "picture.png", scene.prompt, tmp_path / "video.mp4"),
            size=scene.size,
            frames=scene.frames,
            steps=demo_model.STEPS,
            seed=number,
        )
        result = judge(scene, frames_of(request, SHIPPED, profile, cpu))
        assert result.right, (result.prompt, result.measured)
        assert result.psnr >= 28
        assert result.colour_kept


def test_its_vae_gives_held_out_videos_back() -> None:
    model = open_model(SHIPPED)
    config, float32 = model.header.vae, torch.float32
    with (
        model.load("vae", lambda: VaeEncoder(config), device=torch.device("cpu"), dtype=float32) as encoder,
        model.load("vae", lambda: VaeDecoder(config), device=torch.device("cpu"), dtype=float32) as decoder,
        torch.inference_mode(),
    ):
        for scene in HELD_OUT[:2]:
            video = torch.from_numpy(render(scene)[:17]).permute(3, 0, 1, 2) / 127.5 - 1
            back = decoder.decode(encoder.encode(video)[0]).clamp(-1, 1)
            assert psnr(float((127.5 * (back - video)).square().mean())) >= 30
