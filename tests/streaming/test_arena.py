"""Host memory for streamed blocks: exactly as long as asked, and a clear refusal where there is too little."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.streaming import arena as arena_file
from lowvram_i2v.streaming.arena import PAGE, arena
from lowvram_i2v.vae import frames

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


def test_who_wants_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: 2**30)
    with pytest.raises(
        ResourceError, match=r"the decoder's tensors need 2\.00 GiB of RAM, and 1\.00 GiB are"
    ) as caught:
        arena(2**31, CPU, frames.TENANT).__enter__()
    assert "--policy reference" in caught.value.remedy


def test_the_decoder_asks_for_all_its_ram_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two pieces fits, both do not: told before one is made."""
    monkeypatch.setattr(arena_file, "available_ram", lambda: 100 * 2**20)
    memory = frames.Memory(CPU, torch.float32)
    with pytest.raises(ResourceError, match=r"need 0\.12 GiB of RAM, and 0\.10 GiB are"):
        memory.fit(0, 60 * 2**20, 60 * 2**20)
    memory.fit(0, 60 * 2**20, 30 * 2**20)
    memory.close()


def test_memory_that_the_system_refuses_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "available_ram", lambda: None)
    with pytest.raises(ResourceError, match="were refused"):
        arena(2**60, CPU).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes pages on request")
@pytest.mark.parametrize("size", [1, PAGE, 100_001, 40 * 2**20 + 12345])
def test_pages_are_made_at_once_and_nothing_is_written_into_them(size: int) -> None:
    memory = arena_file.page_aligned(size)
    memory.fill_(7)
    arena_file._make_pages(memory)
    assert bool((memory == 7).all())
    fresh = arena_file.page_aligned(size)
    before = _resident()
    arena_file._make_pages(fresh)
    made = _resident() - before
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if release < (5, 14):
        pytest.skip(f"Linux {platform.release()} makes no pages on request, 5.14 does")
    assert made >= 0.9 * (size - 2**20)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
