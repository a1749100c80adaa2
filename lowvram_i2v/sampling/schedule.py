"""The flow-matching schedule: noise levels from 1 to 0, shifted towards noise (arXiv 2403.03206, section 5.3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels, float32 [steps + 1]: u equally spaced from 1 to 0, then shift * u / (1 + (shift - 1) * u).

    The first is exactly 1, the last exactly 0. The model's timestep is 1000 times the level that a step starts from.
    """
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def timesteps_of(sigmas: Tensor) -> Tensor:
    """The model's timestep of each step, float32 [steps]: 1000 times the noise level that the step starts from."""
    return sigmas[:-1] * TIMESTEPS
