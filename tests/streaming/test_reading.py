"""Reading a block from the file: every byte of it at its place, through the cache of files and around it."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import SafetensorsFile, open_safetensors
from lowvram_i2v.streaming import reading
from lowvram_i2v.streaming.arena import PAGE, page_aligned
from lowvram_i2v.streaming.reading import DiskFile, ReadPlan, buffer_bytes
from lowvram_i2v.streaming.slab import SlabLayout, below, layout_of

DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
TENSORS = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=2).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=8
)
BOTH = pytest.mark.parametrize("direct", [False, True])


def never() -> bool:
    return False


def in_file_order(file: SafetensorsFile, block: str, tensors: dict[str, torch.Tensor]) -> SlabLayout:
    names = sorted(tensors, key=lambda name: file.entries[f"{block}.{name}"].start)
    return SlabLayout.of({name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names})


def read(file: SafetensorsFile, plan: ReadPlan, direct: bool) -> torch.Tensor:
    buffer = page_aligned(buffer_bytes(plan.layout.bytes)).fill_(0x5A)
    with closing(DiskFile(file.path, direct)) as disk:
        slab = plan.read(file, disk, buffer, never)
    assert slab.shape == (plan.layout.bytes,)
    return slab.clone()  # as a copy to a slot does, which starts where views of any dtype can


@BOTH
@settings(max_examples=40)
@given(before=TENSORS, tensors=TENSORS, after=TENSORS, wanted=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_every_tensor_comes_to_its_place(
    direct: bool,
    before: list[tuple[tuple[int, ...], torch.dtype]],
    tensors: list[tuple[tuple[int, ...], torch.dtype]],
    after: list[tuple[tuple[int, ...], torch.dtype]],
    wanted: torch.dtype | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"blocks-{direct}.safetensors"
    groups = {"a": before, "b": tensors, "c": after}
    values = {
        f"{block}.t{n}": torch.randint(0, 100, shape).to(dtype)
        for block, group in groups.items()
        for n, (shape, dtype) in enumerate(group)
    }
    save_file(values, path)
    file = open_safetensors(path)
    for block in groups:
        own = {name.removeprefix(f"{block}."): value for name, value in values.items() if name.startswith(f"{block}.")}
        target = {
            name: value.to(wanted) if wanted and value.is_floating_point() else value for name, value in own.items()
        }
        layout = in_file_order(file, block, target)
        slab = read(file, ReadPlan.of(file, block, layout), direct)
        for name, view in layout.views(slab).items():
            assert torch.equal(view, target[name])


@BOTH
@pytest.mark.parametrize("offset", [0, 1, 256, PAGE - 1])
@pytest.mark.parametrize("wanted", [range(0), range(1), range(5, 9000), range(PAGE, 3 * PAGE), range(70_000, 100_001)])
def test_ranges_at_any_place(direct: bool, offset: int, wanted: range, tmp_path: Path, pieces: None) -> None:
    data = torch.randint(0, 256, (100_001,), dtype=torch.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.numpy().tobytes())
    at = (wanted.start - offset) % PAGE + offset
    buffer = page_aligned(buffer_bytes(offset + len(wanted)))
    with closing(DiskFile(path, direct)) as disk:
        disk.read(wanted, buffer, at)
    assert torch.equal(buffer[at : at + len(wanted)], data[wanted.start : wanted.stop])


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of two pages at a time."""
    monkeypatch.setattr(reading, "PIECE", 2 * PAGE)


@BOTH
@pytest.mark.parametrize("left", [0, 100, PAGE, 3 * PAGE, 3 * PAGE + 17])
def test_a_file_that_was_cut_is_an_error(direct: bool, left: int, tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10 * PAGE))
    with closing(DiskFile(path, direct)) as disk:
        os.truncate(path, left)
        with pytest.raises(CheckpointError, match="too early"):
            disk.read(range(100, 9 * PAGE), page_aligned(buffer_bytes(9 * PAGE)), 100)


def test_a_read_is_given_up_between_two_pieces(tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100 * PAGE))
    buffer = page_aligned(100 * PAGE).fill_(7)
    asked = iter([False, False, True])
    with closing(DiskFile(path, False)) as disk:
        disk.read(range(100 * PAGE), buffer, 0, lambda: next(asked))
    assert buffer.eq(0).sum() == 4 * PAGE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for direct in (False, True):
        with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read"):
            DiskFile(tmp_path / "gone.safetensors", direct)


def test_where_the_filesystem_refuses_direct_reads_they_go_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    plain = os.open

    def refuse(target: Path, flags: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(target, flags)

    monkeypatch.setattr(reading.os, "open", refuse)
    with closing(DiskFile(path, True)) as disk:
        assert not disk.direct
        buffer = page_aligned(PAGE)
        disk.read(range(300, 310), buffer, 0)
    assert buffer[:10].tolist() == list(range(44, 54))


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nf4"])
def test_a_block_of_a_model_folder_is_almost_one_read(scheme: str, model_once: Made) -> None:
    """In the compute dtype only odd lengths are left for reads of their own: fp8's single scales."""
    opened = open_model(model_once("token_replace", scheme))
    file = opened.files["transformer"]
    transformer = opened.build("transformer", lambda: HunyuanVideoTransformer(opened.header.transformer))
    for name, block in transformer.blocks().items():

        def start(tensor: str, name: str = name) -> int:
            return file.entries[f"{name}.{tensor}"].start

        layout = layout_of(block, torch.bfloat16, below(name, lambda full: not is_conditioning(full)), start)
        plan = ReadPlan.of(file, name, layout)
        assert len(plan.bulk) > 0.9 * layout.bytes, plan.rest
        for direct in (False, True):
            views = layout.views(read(file, plan, direct))
            for tensor, view in views.items():
                stored = file.read(f"{name}.{tensor}")
                assert torch.equal(view.reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8))
