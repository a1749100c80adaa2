"""Muon's steps: singular values near one, sizes like AdamW's, and only where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.train_demo.optimizer import MATCHED, Muon, optimizers, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_singular_values_become_about_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 1e-4))
    assert found.min() > 0.3
    assert found.max() < 1.3


def test_a_step_is_about_as_large_as_one_of_adamw() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 8, 3, 3, 3))
    weight.grad = torch.randn_like(weight) * 1e-3
    Muon([weight], lr=0.01).step()
    moved = weight.detach().square().mean().sqrt()
    assert 0.7 * 0.01 * MATCHED < moved < 1.2 * 0.01 * MATCHED


def test_a_step_goes_downhill_along_every_direction() -> None:
    """One direction of the gradient is 1000 times steeper than another: both move alike."""
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.diag(torch.tensor([1.0, 1e-3]))
    Muon([weight], lr=1.0).step()
    moved = -weight.detach().diagonal()
    assert (moved > 0).all()
    assert moved.max() / moved.min() < 100


def test_tables_vectors_and_outer_layers_stay_with_adamw() -> None:
    names = ("blocks.0.linear.weight", "blocks.0.linear.bias", "img_in.proj.weight", "embed_tokens.weight")
    parameters = {name: nn.Parameter(torch.ones(4) if "bias" in name else torch.ones(4, 4)) for name in names}
    adamw, muon = optimizers(parameters, 1e-3, muon=True)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(parameters[names[0]])]
    assert len(adamw.param_groups[0]["params"]) == 3
    assert len(optimizers(parameters, 1e-3, muon=False)) == 1
