"""The streaming safetensors writer, judged by the safetensors library, and the order of blocks."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import Made

from lowvram_i2v.checkpoint import BLOCKS, MODULATION, component_file, in_block_order
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.writer import ALIGNMENT, PART, header_bytes, replacing, write_safetensors
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, open_safetensors

DTYPES = [getattr(torch, name) for name in TORCH_DTYPES.values()]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=8),
    st.dictionaries(st.text("abcdef", max_size=5), st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
)
def test_files_are_read_alike_by_the_library_and_by_us(
    tmp_path_factory: pytest.TempPathFactory,
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    values = {
        name: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, (shape, dtype) in layout.items()
    }
    lazy = {
        name: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in values.items()
    }
    write_safetensors(path, lazy, metadata, lambda done: None)
    theirs, ours = load_file(path), open_safetensors(path)
    assert theirs.keys() == ours.entries.keys() == values.keys()
    assert list(ours.entries) == list(values)
    assert ours.metadata == metadata
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    for name, value in values.items():
        for read in (theirs[name], ours.read(name)):
            assert read.dtype == value.dtype
            assert read.shape == value.shape
            assert torch.equal(read.contiguous().reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert len(header_bytes(lazy, metadata)) % ALIGNMENT == 0


def test_a_tensor_other_than_announced_is_an_error(tmp_path: Path) -> None:
    for announced in ((3,), torch.float32), ((2,), torch.float16):
        lazy = {"a": LazyTensor(*announced, lambda: torch.zeros(2))}
        with pytest.raises(CheckpointError, match="was announced"):
            write_safetensors(tmp_path / "x", lazy, {}, lambda done: None)


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()
    write_safetensors(tmp_path / "x", {"a": LazyTensor((4, 3), value.dtype, lambda: value)}, {}, lambda done: None)
    assert torch.equal(load_file(tmp_path / "x")["a"], value)


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        interrupted()
    assert path.read_text() == "old"
    (tmp_path / f"file{PART}").write_text("left by a killed process")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def blocks_of(component: str, names: list[str]) -> list[str | None]:
    """For each name, the block that it belongs to; modulation, which lies apart, belongs to none."""
    pattern = "|".join(re.escape(prefix) for prefix in BLOCKS[component]) or "(?!)"
    names = [
        "" if component == "transformer" and name.split(".")[2:3] and name.split(".")[2] in MODULATION else name
        for name in names
    ]
    return [found[0] if (found := re.match(rf"(?:{pattern})\.\d+\.", name)) else None for name in names]


@pytest.mark.parametrize("component", BLOCKS)
@given(data=st.data())
def test_blocks_are_contiguous_in_any_order_of_the_source(component: str, data: st.DataObject) -> None:
    names = [f"{prefix}.{n}.{part}" for prefix in BLOCKS[component] for n in range(12) for part in ("a.weight", "b")]
    names += ["first.weight", "double_blocks_in.1.bias", "final.norm", "model.norm.weight"]
    shuffled = data.draw(st.permutations(names))
    order = in_block_order(component, dict.fromkeys(shuffled, 16))
    assert sorted(order) == sorted(names)
    blocks = blocks_of(component, order)
    outside = blocks.count(None)
    assert blocks[:outside] == [None] * outside
    expected = [f"{prefix}.{n}." for prefix in BLOCKS[component] for n in range(12) for _ in range(2)]
    assert blocks[outside:] == expected


@pytest.mark.parametrize("component", BLOCKS)
def test_a_block_is_one_range_of_bytes_in_the_file(component: str, model_once: Made) -> None:
    file = open_safetensors(model_once("token_replace", "bf16") / component_file(component))
    names = sorted(file.entries, key=lambda name: file.entries[name].start)
    assert list(file.entries) == names
    blocks = blocks_of(component, names)
    changes = sum(a != b for a, b in pairwise(blocks))
    assert changes == len(set(blocks)) - 1
    assert min(entry.start for entry in file.entries.values()) % ALIGNMENT == 0


def test_metadata_says_what_the_file_is(model_once: Made) -> None:
    metadata = open_safetensors(model_once("latent_concat", "bf16") / "transformer.safetensors").metadata
    facts = json.loads(metadata["lowvram_i2v"])
    assert (facts["component"], facts["variant"], facts["scheme"]) == ("transformer", "latent_concat", "bf16")
