"""The trial of the decoder's kernels finds the right ones right, and a wrong or broken one of them wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowvram_i2v.kernels import decoder_trial, group_norm
from lowvram_i2v.kernels.decoder_trial import LIMIT, fault

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = f"""
import torch
from lowvram_i2v.kernels import decoder_trial, group_norm_triton

here = torch.device("cpu")
errors = [decoder_trial.error(case, decoder_trial.fused(), decoder_trial.SMALL, here)
          for case in decoder_trial.CASES.values()]
assert max(errors) < {LIMIT} / 4, errors
merged = group_norm_triton.merge
group_norm_triton.merge = lambda state, counts, means, squares: merged(state, counts, means + 0.1, squares)
assert " is off by " in decoder_trial.fault(here)
"""


def test_the_kernels_are_right_and_wrong_ones_are_found():
    command = [sys.executable, "-c", INTERPRETED]
    run = subprocess.run(command, cwd=ROOT, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_compiler_that_is_not_there_means_plain_torch(monkeypatch):
    def error(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    monkeypatch.setattr(decoder_trial, "error", error)
    card = torch.device("cuda", 7)
    assert fault(card) == "RuntimeError: Failed to find C compiler."
    fault.cache_clear()


def test_what_is_no_number_is_wrong(monkeypatch):
    monkeypatch.setattr(decoder_trial, "error", lambda case, *_: 0.0 if case.op != "measure" else float("nan"))
    assert "moments is off by nan" in fault(torch.device("cuda", 7))
    fault.cache_clear()


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    def error(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(decoder_trial, "error", error)
    with pytest.raises(torch.OutOfMemoryError):
        fault(torch.device("cuda", 7))


def test_nothing_is_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(decoder_trial, "fault", lambda device: pytest.fail("tried"))
    assert not group_norm.has_triton(torch.empty(1))
