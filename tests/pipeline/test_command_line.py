"""The command line as a user meets it: videos that can be repeated, and every refusal before a weight is read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image
from tiny_models import Made, cut
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v import cli
from lowvram_i2v.attention import choice
from lowvram_i2v.kernels.attention_reference import attention
from lowvram_i2v.safetensors_file import SafetensorsFile
from lowvram_i2v.video import read_settings

ROOT = Path(__file__).resolve().parents[2]
AUTO = ROOT / "profiles" / "auto.toml"
SMALL = ("--size", "64x48", "--frames", "9", "--steps", "2", "--device", "cpu")
SHORT = ("--frames", "5")
Run = Callable[..., int]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def generate(model_once: Made, photo: Path) -> Run:
    """`generate` on the tiny model, with what every call needs; other flags win by coming later."""

    def run(*flags: str, variant: str = "token_replace") -> int:
        model = model_once(variant, "bf16")
        return cli.main(
            ["generate", "--model", str(model), "--image", str(photo), "--prompt", "It moves.", *SMALL, *flags]
        )

    return run


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SafetensorsFile, name: str) -> None:
        raise AssertionError(f"{name} was read before the request was refused")

    monkeypatch.setattr(SafetensorsFile, "read", refuse)


@pytest.mark.parametrize(("variant", "frames"), [("token_replace", 9), ("latent_concat", 5)])
def test_a_video_of_exact_size_that_can_be_repeated(
    variant: str, frames: int, generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    flags = ("--cfg", "2", "--fps", "12", "--dynamic", "--profile", "8gb") if variant == "latent_concat" else ()
    assert generate("--output", str(out), *flags, variant=variant) == 0
    assert capsys.readouterr().out.strip() == str(out)
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(out))
    assert count == frames
    meta = next(imageio_ffmpeg.read_frames(str(out)))
    assert meta["size"] == (64, 48)
    assert meta["pix_fmt"].startswith("yuv420p")
    assert seconds == pytest.approx(frames / (12 if flags else 24), abs=0.05)

    settings = read_settings(out)
    assert settings["flow_shift"] == (17 if flags else 7)
    assert settings == json.loads((tmp_path / "out.mp4.json").read_text())
    assert cli.main(["generate", "--like", str(out), "--device", "cpu", "--output", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    assert f"profile {'8gb' if flags else 'auto'};" in capsys.readouterr().err

    other, tall = tmp_path / "other.mp4", tmp_path / "tall.png"
    Image.linear_gradient("L").resize((60, 99)).convert("RGB").save(tall)
    changed = ["--seed", str(settings["seed"] + 1), "--image", str(tall)]
    assert cli.main(["generate", "--like", str(out), "--device", "cpu", *changed, "--output", str(other)]) == 0
    assert other.read_bytes() != out.read_bytes()
    assert read_settings(other)["size"] == [64, 48]  # asked for, not chosen for the picture


def test_like_takes_the_size_of_a_new_picture_and_says_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that --resolution chose is chosen anew; a profile that is gone is not taken silently."""
    settings = {"image": "a.png", "prompt": "x", "resolution": "360p", "size": [640, 352], "about": {"profile": "mine"}}
    (tmp_path / "old.json").write_text(json.dumps(settings))
    flags = ["generate", "--like", str(tmp_path / "old.json"), "--image", "b.png", "--model", "none", "--device", "cpu"]
    flags += ["--output", str(tmp_path / "new.mp4")]
    request, _, profile = cli._request(cli._parser().parse_args(flags))
    assert request.size is None
    assert profile == "mine"
    assert cli.main(flags) == 1
    assert "profile mine, which is not known here" in capsys.readouterr().err


def test_a_wrong_attention_backend_is_refused_and_the_run_goes_on(
    generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = re.sub(r'(?m)^attention = "[^"]*"', 'attention = "triton-int8"', AUTO.read_text(encoding="utf-8"))
    (tmp_path / "mine.toml").write_text(mine, encoding="utf-8")
    monkeypatch.setattr(choice, "missing", lambda *_: None)  # as on a card that has it
    monkeypatch.setattr(choice, "get", lambda _: lambda q, k, v: attention(q, k, v) + 0.5 * v)
    profile = ("--profile", str(tmp_path / "mine.toml"))
    assert generate("--output", str(tmp_path / "out.mp4"), *profile, *SHORT) == 0
    notice = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("attention: "))
    assert notice.startswith("attention: sdpa (triton-int8 cannot run here")
    assert "its self-test (flat) is off by" in notice
    assert (tmp_path / "out.mp4").is_file()


def test_the_closing_table_names_every_phase(generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--output", str(tmp_path / "out.mp4"), *SHORT) == 0
    table = capsys.readouterr().err.splitlines()
    for phase in ("text", "pooled text", "image", "conditioning", "denoise", "decode", "total"):
        assert any(line.startswith(phase) and line.endswith(("s", "-")) for line in table), phase


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--frames", "10"), "9"),
        (("--frames", "1"), "from 5"),
        (("--size", "70x48"), "64x48"),
        (("--steps", "0"), "--steps"),
        (("--cfg", "0.5"), "--cfg"),
        (("--seed", "-1"), "--seed"),
        (("--flow-shift", "nan"), "--flow-shift"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--output", "nowhere/out.mp4"), "does not exist"),
        (("--output", "out.avi"), ".mp4"),
        (("--model", "nowhere"), "model.json"),
        (("--profile", "nothing"), "6gb"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_refused_before_a_weight_is_read(
    flags: tuple[str, ...], said: str, generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--output", str(tmp_path / "out.mp4"), *flags) == 1
    message = capsys.readouterr().err
    assert message.splitlines()[-2].startswith("lowvram-i2v: ") or message.splitlines()[-1].startswith("lowvram-i2v: ")
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.usefixtures("no_weight_is_read")
def test_guidance_for_weights_without_an_embedder_is_refused(
    generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--output", str(tmp_path / "out.mp4"), "--guidance", "6", variant="latent_concat") == 1
    assert "--cfg" in capsys.readouterr().err


@pytest.mark.usefixtures("no_weight_is_read")
def test_missing_and_cut_components_are_listed_together(
    model_once: Made, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os
    import shutil

    model = Path(shutil.copytree(model_once("token_replace", "bf16"), tmp_path / "model", copy_function=os.link))
    (model / "vae.safetensors").unlink()
    cut(model / "transformer.safetensors", 10)
    flags = ["--model", str(model), "--image", str(photo), "--prompt", "x", "--output", str(tmp_path / "o.mp4"), *SMALL]
    assert cli.main(["generate", *flags]) == 1
    message = capsys.readouterr().err
    assert "vae.safetensors" in message
    assert "transformer.safetensors" in message


@pytest.mark.usefixtures("no_weight_is_read")
def test_a_full_disk_is_refused(
    generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    assert generate("--output", str(tmp_path / "out.mp4")) == 1
    assert "MiB" in capsys.readouterr().err


def test_a_long_prompt_is_shown_cut_and_an_empty_one_is_allowed(
    generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tail = "and this end is not seen"
    assert generate("--output", str(tmp_path / "out.mp4"), "--prompt", "a bird flies " * 200 + tail, *SHORT) == 0
    said = capsys.readouterr().err
    assert tail in said
    assert len(said) < 2000
    assert "is there already" not in said
    assert generate("--output", str(tmp_path / "out.mp4"), "--prompt", "", *SHORT) == 0
    said = capsys.readouterr().err
    assert "The prompt is empty" in said
    assert "out.mp4 is there already" in said


@pytest.mark.parametrize("flags", [("--resolution", "360p"), ("--size", "axb"), ("--frames", "abc"), ("--nonsense",)])
def test_wrong_flags_are_told_in_two_lines(
    flags: tuple[str, ...], generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resolution beside --size too."""
    with pytest.raises(SystemExit) as caught:
        generate("--output", str(tmp_path / "out.mp4"), *flags)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert flags[0] in lines[0]


def test_a_reader_that_goes_is_no_fault() -> None:
    """`| head -1`"""
    command = [sys.executable, "-m", "lowvram_i2v", "profiles"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_an_interrupted_run_leaves_nothing(
    generate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram_i2v import pipeline

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "denoise", interrupted)
    before = sorted(tmp_path.iterdir())
    assert generate("--output", str(tmp_path / "out.mp4")) == 130
    assert sorted(tmp_path.iterdir()) == before
    assert "interrupted" in capsys.readouterr().err


def test_all_missing_flags_are_named_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["generate", "--output", str(tmp_path / "out.mp4")]) == 1
    message = capsys.readouterr().err
    assert "--image" in message
    assert "--prompt" in message


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profiles"]) == 0
    assert "auto" in capsys.readouterr().out
