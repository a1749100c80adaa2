"""`lowvram-i2v plan`: a table without weights or GPU, what fits, and clear refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v.cards import CARDS, Work, attention_time, step_seconds
from lowvram_i2v.cli import main
from lowvram_i2v.dit.config import TransformerConfig

PHASES = ("text", "pooled text", "image", "conditioning", "denoise", "decode")


def test_the_table_names_phases_choices_and_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--profile", "8gb", "--resolution", "540p", "--frames", "65"]) == 0
    shown = capsys.readouterr().out
    for phase in PHASES:
        assert re.search(rf"^{phase} +\d+\.\d\d GiB +\d+\.\d GiB$", shown, re.MULTILINE), phase
    assert "blocks stay on the card" in shown
    assert "estimated, not measured" in shown
    assert all(card.name in shown for card in CARDS)


def test_cards_that_are_too_small_are_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--profile", "24gb", "--scheme", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert [card.name for card in CARDS if card.name in shown] == ["RTX 3090", "RTX 4090", "RTX 5090", "H100 SXM"]


def test_a_model_folder_is_planned_too(model_once: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_once("latent_concat", "int8"))
    assert main(["plan", "--model", folder, "--profile", "6gb", "--size", "128x96", "--frames", "9"]) == 0
    assert "4 of 4 blocks stay on the card" in capsys.readouterr().out


def test_what_fits_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--profile", "8gb", "--size", "960x544", "--max-frames", "--max-size"]) == 0
    frames, size = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"960x544: up to \d+ frames", frames)
    assert re.fullmatch(r"129 frames: up to \d+x\d+", size)


def test_cards_without_8_bit_floats_take_more_where_attention_uses_them(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(profile: str, *flags: str) -> str:
        assert main(["plan", "--profile", profile, *flags]) == 0
        return capsys.readouterr().out

    assert "RTX 30 cards" not in shown("8gb")
    found = re.search(r"on RTX 30 cards.* takes (\d+\.\d\d) GiB, 60 blocks stay", shown("24gb-fast"))
    assert found is not None
    assert f"denoise        {found[1]} GiB" not in shown("24gb-fast")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--profile", "auto"), "no card is known here"),
        (("--profile", "6gb", "--frames", "128"), "4n+1"),
        (("--profile", "6gb", "--size", "1000x700"), "nearest"),
        (("--profile", "6gb", "--size", "4096x4096"), "What fits: --size"),
        (("--vram", "0.5"), "GiB of video memory"),
        (("--vram", "-1"), "--vram"),
        (("--profile", "6gb", "--ram", "0.5"), "GiB of RAM"),
        (("--profile", "nothing"), "6gb"),
        (("--profile", "6gb", "--model", "no-such-folder"), "model folder"),
    ],
)
def test_refusals_say_what_to_do(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", *flags]) == 1
    assert said in capsys.readouterr().err


def test_free_memory_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vram", "20", "--ram", "64", "--size", "512x512"]) == 0
    assert "budget         19.20 GiB beside 0.80 GiB" in capsys.readouterr().out


def test_what_is_free_holds_cudas_part_and_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """RAM is compared with all that the program takes: a little less than it asks for is refused."""
    assert main(["plan", "--profile", "8gb", "--vram", "6", "--size", "512x512"]) == 0
    assert "budget          5.20 GiB beside 0.80 GiB" in capsys.readouterr().out
    assert main(["plan", "--profile", "6gb", "--ram", "2"]) == 1
    said = capsys.readouterr().err
    found = re.search(r"needs (\d\.\d\d) GiB of RAM.* can have 2\.00 GiB", said)
    assert found is not None
    assert main(["plan", "--profile", "6gb", "--ram", f"{float(found[1]) - 0.02:.2f}"]) == 1


def test_blocks_from_the_file_come_at_the_disks_rate(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(ram: str) -> tuple[str, float]:
        video = ["--scheme", "bf16", "--size", "512x512", "--frames", "5"]
        assert main(["plan", "--profile", "6gb", *video, "--ram", ram]) == 0
        header, _, cards = capsys.readouterr().out.partition("estimated")[2].partition("\n")
        found = re.search(r"RTX 4090 +(\d+\.\d) s", cards)
        assert found is not None
        return header, float(found[1])

    (from_ram, soon), (from_file, late) = shown("64"), shown("4")
    assert late > soon
    assert "1.8 GB/s" in from_file
    assert "1.8 GB/s" not in from_ram


def test_flags_of_the_released_model_are_refused_beside_a_folder(
    model_once: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_once("token_replace", "bf16"))
    assert main(["plan", "--profile", "6gb", "--model", folder, "--scheme", "nf4"]) == 1
    said = capsys.readouterr().err
    assert "--scheme nf4 beside --model" in said
    assert "stored as bf16" in said
    assert "--variant" not in said
    assert main(["plan", "--profile", "6gb", "--model", folder, "--variant", "token_replace"]) == 1
    assert "--variant token_replace beside --model" in capsys.readouterr().err


def test_a_step_takes_the_longer_of_arithmetic_and_copying() -> None:
    config = TransformerConfig()
    work = Work.of(config, 119200, 400, 2)
    assert work.attention + work.products == pytest.approx(12.1e15, rel=0.02)
    card = next(card for card in CARDS if card.name == "RTX 4090")
    assert step_seconds(card, work, 9_060_000_000, False) == step_seconds(card, work, 0, False)
    small = Work.of(config, 100, 100, 2)
    assert step_seconds(card, small, 25_000_000_000, False) == pytest.approx(1.0)
    assert step_seconds(card, small, 1_800_000_000, False, from_file=True) == pytest.approx(1.0)
    assert step_seconds(card, work, 0, True) < step_seconds(card, work, 0, False)
    times = [attention_time(name, 0.2, 0.2) for name in ("sdpa", "triton-int8", "triton-sparse")]
    assert times == sorted(times, reverse=True)
    assert step_seconds(card, work, 0, True, times[2]) < step_seconds(card, work, 0, True)
    assert attention_time("triton-sparse", 1.0, 0.5) == attention_time("triton-int8", 1.0, 0.5)
