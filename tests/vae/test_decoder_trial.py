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
assert decoder_trial.fault(here) is None, decoder_trial.fault(here)
assert max(error for _, error in decoder_trial.errors(here)) < {LIMIT} / 4
merged = group_norm_triton.merge
group_norm_triton.merge = lambda state, counts, means, squares: merged(state, counts, means + 0.1, squares)
decoder_trial.fault.cache_clear()
assert " is off by " in decoder_trial.fault(here)
"""


def test_the_kernels_are_right_and_wrong_ones_are_found():
    command = [sys.executable, "-c", INTERPRETED]
    run = subprocess.run(command, cwd=ROOT, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_compiler_that_is_not_there_means_plain_torch(monkeypatch):
    def errors(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    monkeypatch.setattr(decoder_trial, "errors", errors)
    card = torch.device("cuda", 7)
    assert fault(card) == "RuntimeError: Failed to find C compiler."
    fault.cache_clear()


def test_what_is_no_number_is_wrong(monkeypatch):
    monkeypatch.setattr(decoder_trial, "errors", lambda _: [("a", 0.0), ("b", float("nan")), ("c", 1e-3)])
    assert "b is off by nan" in fault(torch.device("cuda", 7))
    fault.cache_clear()


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    def errors(device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(decoder_trial, "errors", errors)
    with pytest.raises(torch.OutOfMemoryError):
        fault(torch.device("cuda", 7))


def test_nothing_is_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(decoder_trial, "fault", lambda device: pytest.fail("tried"))
    assert not group_norm.has_triton(torch.empty(1))
