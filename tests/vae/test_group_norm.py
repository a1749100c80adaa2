"""The two ops of a streamed group norm: against torch's group norm, and the Triton kernels in Triton's interpreter."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lowvram_i2v.kernels.group_norm import Moments, add_and_measure, normalize_into

ROOT = Path(__file__).resolve().parents[2]


def test_chunks_give_the_norm_of_the_whole():
    """A mean a thousand times the spread: E[x^2] - E[x]^2 would lose it."""
    torch.manual_seed(0)
    x = torch.randn(9, 6, 7, 8) + 1000
    weight, bias = torch.randn(8), torch.randn(8)
    moments = Moments(2, x.device)
    for chunk in x.clone().split([1, 3, 5]):
        add_and_measure(chunk, torch.zeros(8), None, moments)
    out = torch.empty(9, 6, 9, 8)
    normalize_into(out, x, moments.affine(weight, bias, 1e-6), 0, 0)
    channels_first = x.permute(3, 0, 1, 2)[None].double()
    expected = F.silu(F.group_norm(channels_first, 2, weight.double(), bias.double(), 1e-6))[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(out[:, :, 1:-1].double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("above", "below"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_borders_are_replicated(above, below):
    x = torch.randn(2, 3, 4, 8)
    out = torch.empty(2, 3 + above + below, 6, 8)
    normalize_into(out, x, None, above, below)
    expected = F.pad(x.permute(3, 0, 1, 2)[None], (1, 1, above, below, 0, 0), mode="replicate")[0].permute(1, 2, 3, 0)
    assert torch.equal(out, expected)


def test_only_the_rows_asked_for_are_measured():
    x, residual, bias = torch.randn(2, 5, 3, 8), torch.randn(2, 9, 3, 8)[:, 2:7], torch.randn(8)
    whole, part = Moments(4, x.device), Moments(4, x.device)
    expected = x + residual + bias
    add_and_measure(x, bias, residual, part, slice(1, 4))
    torch.testing.assert_close(x, expected)
    add_and_measure(expected[:, 1:4].clone(), torch.zeros(8), None, whole)
    ones = torch.ones(8)
    for ours, theirs in zip(part.affine(ones, ones, 1e-6), whole.affine(ones, ones, 1e-6), strict=True):
        torch.testing.assert_close(ours, theirs)


INTERPRETED = """
import torch
from lowvram_i2v.kernels import group_norm as plain, group_norm_triton as fused
from lowvram_i2v.kernels import softmax_step as step, softmax_step_triton

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
    for channels, (frames, rows, width) in ((8, (3, 5, 7)), (48, (2, 4, 9)), (512, (2, 3, 20))):
        x = torch.randn(frames, rows + 4, width, channels).to(dtype)[:, 1 : 1 + rows]
        for affine in (None, (torch.randn(channels), torch.randn(channels))):
            for above, below in ((0, 0), (1, 0), (1, 1)):
                a = torch.zeros(frames, rows + above + below, width + 2, channels, dtype=dtype)
                b = a.clone()
                plain.normalize_into(a, x, affine, above, below)
                fused.normalize_into(b, x, affine, above, below)
                torch.testing.assert_close(b, a, atol=limit, rtol=limit)
        for residual in (None, x):
            for part in (slice(0, rows), slice(1, 3)):
                a, bias = torch.randn(frames, rows, width, channels).to(dtype) + 3, torch.randn(channels).to(dtype)
                b, ones = a.clone(), torch.ones(channels)
                ours, theirs = plain.Moments(4, a.device), plain.Moments(4, a.device)
                for _ in range(2):
                    plain.add_and_measure(a, bias, residual, theirs, part)
                    fused.add_and_measure(b, bias, residual, ours, part)
                torch.testing.assert_close(b, a, atol=limit, rtol=limit)
                for one, other in zip(ours.affine(ones, ones, 1e-6), theirs.affine(ones, ones, 1e-6)):
                    torch.testing.assert_close(one, other, atol=limit, rtol=limit)

x, bias = torch.randn(2, 5, 7, 8), torch.randn(8)
ours, theirs, before = plain.Moments(4, x.device), plain.Moments(4, x.device), x.clone()
plain.measure(x, bias, theirs, slice(1, 4))
fused.measure(x, bias, ours, slice(1, 4))
torch.testing.assert_close(ours.state, theirs.state, atol=1e-5, rtol=1e-5)
assert torch.equal(x, before)

# a program of many tiles: values far from 0 that drift, and a last tile that is not full
fused.PARTS, fused.MEASURED_TILE = 2, 64
x = torch.randn(3, 11, 13, 8) + 300 + torch.linspace(0, 40, 11)[:, None, None]
for residual in (None, torch.randn(3, 11, 13, 8) - 500):
    for part in (slice(0, 11), slice(4, 9)):
        a, b = x.clone(), x.clone()
        ours, theirs = plain.Moments(4, x.device), plain.Moments(4, x.device)
        plain.add_and_measure(a, bias, residual, theirs, part)
        fused.add_and_measure(b, bias, residual, ours, part)
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(ours.state, theirs.state, atol=1e-5, rtol=1e-5)

for time, first, dropped in ((1, 0, 0), (2, 0, 1), (2, 3, 0), (2, 4, 1)):
    top = -1 if not first else (first - 1) // 2
    phases, spread = torch.randn(3, 4, 6, time * 32), plain.Phases(time, first, top, dropped)
    a = torch.zeros(time * 3 - dropped, 5, 10, 8)
    b, ours, theirs = a.clone(), plain.Moments(4, a.device), plain.Moments(4, a.device)
    plain.interleave(a, phases, spread, bias, theirs, slice(1, 4))
    fused.interleave(b, phases, spread, bias, ours, slice(1, 4))
    torch.testing.assert_close(b, a)
    torch.testing.assert_close(ours.state, theirs.state, atol=1e-5, rtol=1e-5)

counts, means, squares = torch.randint(0, 9, (70,)).float(), torch.randn(70, 48) + 5, torch.rand(70, 48)
theirs, ours = plain.Moments(3, x.device), torch.zeros(3, 3, dtype=torch.float64)
for _ in range(2):
    theirs.add(counts, means, squares)
    fused.merge(ours, counts, means, squares)
torch.testing.assert_close(ours, theirs.state)

total, highest, sums, values = torch.zeros(6, 5), torch.full((6,), -torch.inf), torch.zeros(6), torch.randn(18, 5)
scores, mine = torch.randn(6, 18) * 9, [total.clone(), highest.clone(), sums.clone()]
for part in (slice(0, 9), slice(9, 18)):
    for run, state in ((step.softmax_step, (total, highest, sums)), (softmax_step_triton.softmax_step, mine)):
        weights = torch.empty(6, 9)
        run(scores[:, part].contiguous(), 0.3, weights, *state)
        state[0].add_(weights @ values[part])
expected = torch.softmax(scores * 0.3, 1) @ values
torch.testing.assert_close(total / sums[:, None], expected)
torch.testing.assert_close(mine[0] / mine[2][:, None], expected)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_in_the_interpreter():
    import os

    subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
