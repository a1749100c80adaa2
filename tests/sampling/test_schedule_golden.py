"""The flow schedule and the Euler step against the reference."""

from __future__ import annotations

import pytest
import torch

from goldens import golden, names, relative_l2
from lowvram_i2v.sampling.denoise import denoise
from lowvram_i2v.sampling.schedule import flow_sigmas, timesteps_of

SCHEDULES = names("D_")


class Unconditioned:
    def enter(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def model_input(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


@pytest.mark.golden
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_and_timesteps(name: str) -> None:
    case = golden(name)
    for steps, shift in case.info["config"]["pairs"]:
        key = f"{steps}_{shift:g}"
        sigmas = flow_sigmas(steps, shift)
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        assert (sigmas - case[f"sigmas.{key}"]).abs().max() < 1e-6
        assert (timesteps_of(sigmas) - case[f"timesteps.{key}"]).abs().max() < 5e-4


@pytest.mark.golden
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_runs_down(name: str) -> None:
    """Without its switch the reference's schedule runs up, 1 - sigma: what inference must not use."""
    case = golden(name)
    for key in [key for key in case.tensors if key.startswith("not_reversed.sigmas.")]:
        steps, shift = key.removeprefix("not_reversed.sigmas.").split("_")
        sigmas = flow_sigmas(int(steps), float(shift))
        assert (1 - sigmas - case[key]).abs().max() < 1e-6
        assert (sigmas.diff() < 0).all()


@pytest.mark.golden
@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_steps(name: str) -> None:
    case = golden(name)
    runs = sorted({key.rsplit(".", 1)[0] for key in case.tensors if key.startswith("euler.")})
    assert runs
    for run in runs:
        steps, shift = run.removeprefix("euler.").split("_")
        count = sum(key.startswith(f"{run}.velocity") for key in case.tensors)
        velocities = iter([case[f"{run}.velocity{i}"][0] for i in range(count)])
        seen: list[torch.Tensor] = []
        denoise(
            lambda _, __, velocities=velocities: next(velocities),
            Unconditioned(),
            case[f"{run}.x0"][0],
            flow_sigmas(int(steps), float(shift))[: count + 1],
            lambda _, x, seen=seen: seen.append(x),
        )
        for i, x in enumerate(seen):
            assert relative_l2(x[None], case[f"{run}.x{i + 1}"]) < 1e-6, (run, i)
