"""Parts of tiles on their way to the CPU: each in its place, no buffer used anew before its part is there."""

from __future__ import annotations

from time import sleep

import pytest
import torch

from lowvram_i2v.vae import landing
from lowvram_i2v.vae.landing import Landing
from lowvram_i2v.vae.planning import LANDING

ROWS, COLUMNS = (5, 5, 3), (4, 4, 4, 1)


class Late:
    """An event that is reached after a while."""

    def synchronize(self) -> None:
        sleep(0.002)


def parts() -> dict[tuple[int, int], torch.Tensor]:
    """(top, left) -> part, row after row; edge tiles are smaller."""
    generator = torch.Generator().manual_seed(0)
    tops, lefts = (sum(ROWS[:n]) for n in range(len(ROWS))), [sum(COLUMNS[:n]) for n in range(len(COLUMNS))]
    return {
        (top, left): torch.randn(3, 9, height, width, generator=generator)
        for top, height in zip(tops, ROWS, strict=True)
        for left, width in zip(lefts, COLUMNS, strict=True)
    }


def joined(given: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    listed = list(given.values())
    rows = [torch.cat(listed[start : start + len(COLUMNS)], 3) for start in range(0, len(listed), len(COLUMNS))]
    return torch.cat(rows, 2)


def test_parts_on_the_cpu_are_copied_at_once() -> None:
    given, picture = parts(), Landing(sum(ROWS), sum(COLUMNS))
    for (top, left), part in given.items():
        passing = part.clone()
        picture.put(passing, top, left)
        passing.fill_(torch.nan)
    assert torch.equal(picture.finished(), joined(given))


def test_a_refused_lock_means_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = torch.empty

    def refusing(size: int, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return ordinary(size)

    monkeypatch.setattr(torch, "empty", refusing)
    assert landing._page_locked(5).shape == (5,)


def test_parts_of_a_device_land_late_in_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def page_locked(size: int) -> torch.Tensor:
        made.append(torch.full((size,), torch.nan))
        return made[-1]

    monkeypatch.setattr(landing, "_page_locked", page_locked)
    monkeypatch.setattr(landing, "_recorded", lambda _: Late())
    given, picture = parts(), Landing(sum(ROWS), sum(COLUMNS))
    made_of = torch.full((3, 9, sum(ROWS), sum(COLUMNS)), torch.nan)
    for (top, left), part in given.items():
        picture._send(part, made_of[:, :, top : top + part.shape[2], left : left + part.shape[3]])
    picture.finished()
    assert torch.equal(made_of, joined(given))
    assert len(made) < 2 * LANDING
