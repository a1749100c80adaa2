"""`check-kernels`: every op and backend has its row, a wrong one is named, and the exit status says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowvram_i2v import attention, cli, kernel_check
from lowvram_i2v.attention import choice, sparse_trial
from lowvram_i2v.kernels import decoder_trial, op_cases
from lowvram_i2v.kernels.op_cases import CASES, Sizes
from lowvram_i2v.kernels.ops import PLAIN

CPU = torch.device("cpu")
FEW = Sizes(40, 13, 2, 16, 48)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "ON_CPU", FEW)


@pytest.mark.usefixtures("few")
def test_without_a_card_plain_torch_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-kernels", "--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in CASES)
    assert all(f" {name} " in said for name in attention.BACKENDS)
    assert "Kernels need a CUDA card" in said
    assert "WRONG" not in said


@pytest.mark.usefixtures("few")
def test_wrong_ops_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image\nfor this device")

    table = replace(PLAIN, gelu=lambda x, out: out.copy_(2 * x), gated_residual_=broken)
    monkeypatch.setattr(kernel_check, "choose", lambda _: table)
    monkeypatch.setattr(kernel_check.attention, "get", lambda _: lambda q, k, v: v)
    assert cli.main(["check-kernels", "--tokens", "90", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    lines = {line.partition("  ")[0]: line for line in said.splitlines()}
    assert lines["gelu"].endswith("WRONG")
    assert lines["gated residual"].endswith("WRONG RuntimeError: no kernel image")
    assert lines["norm, modulate"].endswith("right")
    assert lines["attention, peaked"].endswith("WRONG")
    assert 'compute = "w8a16"' in said.splitlines()[-2]


def test_the_decoders_ops_have_rows_too() -> None:
    """With one that is wrong and one that breaks; on a card, where they are not their own definitions."""

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image")

    def twice(x: Tensor, bias: Tensor, *rest: object) -> None:
        decoder_trial.PLAIN.add_and_measure(x, 2 * bias, *rest)

    ops = decoder_trial.PLAIN._replace(add_and_measure=twice, interleave=broken)
    rows = {row.op: row for row in kernel_check.decoder_rows(CPU, ops, decoder_trial.SMALL)}
    assert len(rows) == len(decoder_trial.CASES)
    wrong = {name for name, row in rows.items() if not row.right}
    assert wrong == {"decoder: bias, residual, moments", "decoder: phases in order, moments"}
    assert rows["decoder: phases in order, moments"].verdict == "WRONG RuntimeError: no kernel image"


def test_wrong_lists_of_a_long_video_are_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lists_fault(layout: attention.Layout, density: float, device: torch.device, head_dim: int) -> str:
        asked.append((layout.image_tokens + layout.text_tokens, density, head_dim))
        return "its lists are not whole"

    monkeypatch.setattr(sparse_trial, "lists_fault", lists_fault)
    row = kernel_check._sparse_row(CPU, 5001, None)
    assert asked == [(5001, kernel_check.DENSITY, kernel_check.DIM)]
    assert row.verdict == "WRONG its lists are not whole"


def test_on_an_old_card_only_torchs_attention_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(kernel_check, "_attention_row", lambda row, *_: row)
    rows = list(kernel_check.attention_rows(torch.device("cuda"), 90))
    assert {row.kernel for row in rows if not row.skipped} == {"sdpa"}
    assert all("7.5" in row.verdict for row in rows if row.skipped)


def test_no_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-kernels", "--tokens", "0"]) == 1
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_what_is_timed_is_the_call_of_the_case(name: str) -> None:
    """Recorded once, with arguments that every table takes."""
    case, calls = CASES[name], []
    table = replace(PLAIN, **{case.op: kernel_check._recording(getattr(PLAIN, case.op), calls)})
    op_cases.error(case, table, FEW, CPU, torch.float32)
    assert len(calls) == 1
    getattr(PLAIN, case.op)(*calls[0])


def test_the_length_of_a_video() -> None:
    from lowvram_i2v.cli_kernels import VIDEO, tokens_of
    from lowvram_i2v.plan import Video, tokens
    from lowvram_i2v.sizes import sizes_of
    from lowvram_i2v.synth.headers import model_headers
    from lowvram_i2v.variant import VARIANTS

    sizes = sizes_of(model_headers("full", VARIANTS["token_replace"], "int8"))
    assert tokens_of(VIDEO) == sum(tokens(sizes, Video(*VIDEO)))


@pytest.mark.gpu
def test_all_kernels_are_right_on_this_card() -> None:
    rows = list(kernel_check.check(torch.device("cuda"), 5001))
    assert not [row for row in rows if not row.right]
    assert all(row.ms for row in rows if row.kernel == "triton" and not row.op.startswith("attention"))


@pytest.mark.gpu
def test_times_are_those_of_the_device() -> None:
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    y: Tensor = torch.empty_like(x)
    assert 0.01 < kernel_check.milliseconds(lambda: y.copy_(x), x.device) < 50
