"""The demo model's place: `--model demo`, the default, `lowvram-i2v demo`, and what the package carries.

A micro-trained export stands where the trained folder will ship.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import training_micro as micro
from PIL import Image

from lowvram_i2v import cli, demo_model
from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.compare import read_frames
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import ignore
from lowvram_i2v.pipeline import generate
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.video import read_settings
from tools import ship_demo
from tools.attention_stand_in import attend
from tools.demo_table import frames_of
from tools.train_demo import flow, scenes, text, vae
from tools.train_demo.export import export
from tools.train_demo.render import render
from tools.train_demo.sizes import DEMO, MOST_BYTES

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "2", "--frames", "5", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the micro model, hardly trained."""
    run = micro.run(tmp_path_factory.mktemp("work"))
    recipe = replace(micro.MICRO, **{name: micro.stage(1, 1, 1e-3) for name in ("vae", "text")})
    recipe = replace(recipe, flow=micro.stage(3, 1, 1e-2))  # the gates open in the second step
    with micro.clips() as source:
        vae.train(recipe, source, run)
        text.prepare(recipe, micro.prompts(), run.work)
        text.train(recipe, micro.COUNTS, source, run)
        flow.train(recipe, source, run)
    return export(recipe, run)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the package's; it holds the picture and no weights."""
    folder = tmp_path / "lowvram_i2v"
    folder.mkdir()
    shutil.copy(demo_model.package_file(demo_model.PICTURE), folder)
    monkeypatch.setattr(demo_model, "files", lambda _: folder)
    return folder


@pytest.fixture
def placed(package: Path, trained: Path) -> Path:
    ship_demo.place(trained, package / demo_model.FOLDER)
    return package / demo_model.FOLDER


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 100)).convert("RGB").save(path)
    return path


def test_one_place_says_whether_it_is_there(package: Path, trained: Path) -> None:
    assert demo_model.shipped() is None
    assert demo_model.model_path("demo") == Path("demo")
    assert not demo_model.is_demo(None)
    ship_demo.place(trained, package / demo_model.FOLDER)
    assert demo_model.shipped() == package / demo_model.FOLDER
    assert demo_model.is_demo(demo_model.model_path("demo"))
    assert demo_model.is_demo(demo_model.model_path("/elsewhere/lowvram_i2v/demo_weights"))
    assert demo_model.model_path("other") == Path("other")


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
    placed: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
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
    assert [(one.size, one.frames, folder) for one, folder in asked] == [((32, 48), 5, placed), ((192, 128), 5, placed)]


def test_what_it_knows_is_the_default_and_flags_win(
    placed: Path, photo: Path, tmp_path: Path, asked: list[tuple[GenerateRequest, Path]]
) -> None:
    flags = ["generate", "--image", str(photo), "--prompt", "x", "--output", str(tmp_path / "o.mp4"), "--device", "cpu"]
    assert cli.main([*flags, "--model", "demo"]) == 0
    assert cli.main([*flags, "--resolution", "360p", "--frames", "9", "--steps", "3"]) == 0
    assert cli.main([*flags, "--size", "64x64"]) == 0
    assert cli.main([*flags, "--model", "another"]) == 0
    assert [folder for _, folder in asked] == [placed, placed, placed, Path("another")]
    settings = [(request.size, request.resolution, request.frames, request.steps) for request, _ in asked]
    assert settings == [
        ((128, 192), "720p", demo_model.FRAMES, demo_model.STEPS),
        (None, "360p", 9, 3),
        ((64, 64), "720p", demo_model.FRAMES, demo_model.STEPS),
        (None, "720p", 129, 50),
    ]


@pytest.mark.usefixtures("package")
def test_without_weights_a_model_has_to_be_named(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["generate", "--image", str(photo), "--prompt", "x", "--output", str(tmp_path / "o.mp4"), *SHORT]
    assert cli.main(flags) == 1
    assert "--model not given" in capsys.readouterr().err
    assert cli.main([*flags, "--model", "demo"]) == 1
    assert "model.json" in capsys.readouterr().err


@pytest.mark.usefixtures("placed")
def test_the_demo_animates_its_picture_and_writes_nowhere_else(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_i2v import demo

    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "FRAMES", 5)
    before = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
    out = tmp_path / "new" / "out"
    assert cli.main(["demo", "--folder", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "demo.mp4")
    assert {path.name for path in out.iterdir()} == {"demo.mp4", "demo.mp4.json", demo_model.PICTURE}
    settings = read_settings(out / "demo.mp4")
    assert (settings["prompt"], settings["size"], settings["frames"]) == (demo_model.PROMPT, [192, 128], 5)
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*")} == before


@pytest.mark.usefixtures("placed")
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


def test_the_table_sees_the_frames_that_the_file_gets(trained: Path, photo: Path, tmp_path: Path) -> None:
    """`tools.demo_table` runs the same phases; what cannot run here is refused, never replaced."""
    cpu, profile = torch.device("cpu"), load_profile("auto")
    request = GenerateRequest(photo, "A red square moves left.", tmp_path / "o.mp4", size=(32, 48), frames=5, steps=2)
    frames = frames_of(request, trained, profile, cpu)
    assert frames.shape == (5, 48, 32, 3)
    with closing(read_frames(generate(request, trained, profile, cpu, ignore))) as written:
        assert np.abs(np.stack(list(written)).astype(int) - frames).mean() < 12  # H.264, colours at half the size
    eight_bit = frames_of(request, trained, profile, cpu, stand_in=attend)
    assert not np.array_equal(eight_bit, frames)
    assert np.abs(eight_bit.astype(int) - frames).max() < 40
    with pytest.raises(RequestError, match="cannot run here"):
        frames_of(request, trained, replace(profile, attention="triton-int8"), cpu)


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
    package: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = package / demo_model.FOLDER
    other = tmp_path / "model-bf16"
    shutil.copytree(trained, other)
    records = json.loads((other / "model.json").read_text())
    records["components"]["transformer"]["scheme"] = "bf16"
    (other / "model.json").write_text(json.dumps(records))
    assert ship_demo.main([str(other)]) == 1
    assert "is bf16" in capsys.readouterr().err
    assert ship_demo.main([str(tmp_path)]) == 1
    assert "model.json" in capsys.readouterr().err
    monkeypatch.setattr(ship_demo, "MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000"):
        ship_demo.place(trained, target)
    assert not target.exists()


def test_the_wheel_contains_picture_and_weights(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setuptools copies of a tree laid out and configured like this one, with weights in place."""
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "lowvram_i2v", tree / "lowvram_i2v", ignore=shutil.ignore_patterns("__pycache__", demo_model.FOLDER)
    )
    shutil.copytree(trained, tree / "lowvram_i2v" / demo_model.FOLDER)
    monkeypatch.chdir(tree)
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
    files = {path.relative_to(trained) for path in trained.rglob("*") if path.is_file()}
    copied = built / demo_model.FOLDER
    assert {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()} == files


def test_what_ships_is_small_enough() -> None:
    files = [demo_model.package_file(demo_model.PICTURE), *demo_model.package_file(demo_model.FOLDER).rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= MOST_BYTES
