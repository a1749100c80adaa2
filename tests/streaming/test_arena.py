"""Host memory for streamed blocks: exactly as long as asked, and a clear refusal where there is too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.streaming import arena as arena_file
from lowvram_i2v.streaming.arena import arena, available_ram
from lowvram_i2v.streaming.slab import ALIGNMENT

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT, 100_001])
def test_the_arena_is_as_long_as_asked_and_aligned(size: int) -> None:
    with arena(size, CPU) as memory:
        assert memory.dtype == torch.uint8
        assert memory.shape == (size,)
        assert memory.untyped_storage().nbytes() <= size + ALIGNMENT
        assert size == 0 or memory.data_ptr() % ALIGNMENT == 0


def test_too_little_ram_is_refused_with_need_and_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: 3 * 2**30)
    with pytest.raises(ResourceError, match=r"need 8\.50 GiB of RAM, and 3\.00 GiB are available") as caught:
        arena(17 * 2**29, CPU).__enter__()
    assert "resident_blocks" in caught.value.remedy


def test_memory_that_the_system_refuses_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: None)
    with pytest.raises(ResourceError, match="were refused"):
        arena(2**60, CPU).__enter__()


def test_available_ram_is_read_where_the_system_tells_it(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    assert available_ram(path) is None
    path.write_text("MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    4000 kB\n")
    assert available_ram(path) == 4_096_000
    path.write_text("MemTotal:       16000000 kB\n")
    assert available_ram(path) is None
