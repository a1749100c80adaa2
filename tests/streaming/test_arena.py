"""Host memory for streamed blocks: exactly as long as asked, and a clear refusal where there is too little."""

from __future__ import annotations

import pytest
import torch

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.streaming import arena as arena_file
from lowvram_i2v.streaming.arena import PAGE, arena

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, PAGE, 100_001])
def test_the_arena_is_as_long_as_asked_and_aligned(size: int) -> None:
    with arena(size, CPU) as memory:
        assert memory.dtype == torch.uint8
        assert memory.shape == (size,)
        assert memory.untyped_storage().nbytes() <= size + PAGE
        assert size == 0 or memory.data_ptr() % PAGE == 0


def test_too_little_ram_is_refused_with_need_and_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: 3 * 2**30)
    with pytest.raises(ResourceError, match=r"need 8\.50 GiB of RAM, and 3\.00 GiB are available") as caught:
        arena(17 * 2**29, CPU).__enter__()
    assert "resident_blocks" in caught.value.remedy


def test_memory_that_the_system_refuses_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: None)
    with pytest.raises(ResourceError, match="were refused"):
        arena(2**60, CPU).__enter__()
