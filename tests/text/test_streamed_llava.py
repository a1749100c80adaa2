"""The streamed LLaVA: the loaded one's bits, in two layers' memory, and the planner knows how much that is."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowvram_i2v.checkpoint import ModelFolder
from lowvram_i2v.convert.policy import SCHEME_NAMES, Layout, layout
from lowvram_i2v.convert.shapes import llava_shapes
from lowvram_i2v.convert.writer import DTYPE_NAMES, write_layout
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import SafetensorsFile, TensorEntry, open_safetensors
from lowvram_i2v.streaming.load import slab_bytes
from lowvram_i2v.synth.headers import model_headers
from lowvram_i2v.synth.weights import random_tensors
from lowvram_i2v.text.encode import prompt_rows
from lowvram_i2v.text.llava import SKIPPED_LAYERS, build_llava, image_rows, llava_tensor_name
from lowvram_i2v.text.streamed import (
    _TEXT_SIZES,
    _VISION_SIZES,
    PREFIX_LENGTH,
    EmbeddingRows,
    is_loaded,
    longest_prompt,
    text_bytes,
    weight_bytes,
)
from lowvram_i2v.text.streamed import streamed_llava as streamed
from lowvram_i2v.text.template import TEXT_LENGTH
from lowvram_i2v.variant import VARIANTS

CPU = torch.device("cpu")
PICTURES = Image.radial_gradient("L").resize((60, 40)).convert("RGB"), Image.new("RGB", (40, 60))
EMBEDDING = "model.embed_tokens.weight"
LAYERS = 4
IMAGE_SIZE = 56


def with_layers(config: dict[str, Any], **text_sizes: int) -> dict[str, Any]:
    """The config with LAYERS decoder layers that are used, more than there are slots, and a small vision tower."""
    changed = copy.deepcopy(config)
    changed["text_config"] |= {"num_hidden_layers": LAYERS + SKIPPED_LAYERS, **text_sizes}
    changed["vision_config"]["image_size"] = IMAGE_SIZE
    return changed


def stored_as(config: dict[str, Any], scheme: str) -> Layout:
    """The text encoder's file, with random weights."""
    return layout("text_encoder", scheme, random_tensors("text_encoder", llava_shapes(config), torch.float32, 0, CPU))


def folder_of(path: Path, file: SafetensorsFile) -> ModelFolder:
    """A model folder of which only the text encoder is there."""
    return dataclasses.replace(
        model_headers("tiny", VARIANTS["token_replace"], "bf16"), path=path, files={"text_encoder": file}
    )


def write(folder: Path, config: dict[str, Any], scheme: str) -> ModelFolder:
    path = folder / f"{scheme}.safetensors"
    write_layout(path, stored_as(config, scheme), {}, CPU, lambda done: None)
    return folder_of(folder, open_safetensors(path))


@contextmanager
def loaded_llava(
    model: ModelFolder, config: dict[str, Any], dtype: torch.dtype, device: torch.device = CPU
) -> Iterator[Any]:
    with model.load(
        "text_encoder", lambda: build_llava(config), device=device, dtype=dtype, file_name=llava_tensor_name
    ) as llava:
        yield llava


@contextmanager
def streamed_llava(
    model: ModelFolder, config: dict[str, Any], dtype: torch.dtype, device: torch.device = CPU
) -> Iterator[Any]:
    with (
        model.load(
            "text_encoder",
            lambda: build_llava(config),
            device=device,
            dtype=dtype,
            file_name=llava_tensor_name,
            only=is_loaded,
        ) as built,
        streamed(model.files["text_encoder"], built, device=device, dtype=dtype) as llava,
    ):
        yield llava


@pytest.mark.golden
@pytest.mark.parametrize(
    ("scheme", "dtype"), [*((scheme, torch.float32) for scheme in SCHEME_NAMES), ("fp8", torch.bfloat16)]
)
def test_streamed_equals_loaded_bit_for_bit(text: Any, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    config = with_layers(text.llava_config)
    model = write(tmp_path, config, scheme)
    asked = [("a boat", PICTURES[0]), ("", PICTURES[1])]
    threads = threading.active_count()
    with loaded_llava(model, config, dtype) as llava:
        expected = [prompt_rows(llava, text.llava_tokenizer, prompt, picture, 4) for prompt, picture in asked]
    with streamed_llava(model, config, dtype) as llava:
        table = llava.get_input_embeddings()
        actual = [prompt_rows(llava, text.llava_tokenizer, prompt, picture, 4) for prompt, picture in asked]
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype == dtype
        assert one.isfinite().all()
    assert isinstance(table, EmbeddingRows)
    assert isinstance(llava.get_input_embeddings(), torch.nn.Embedding)
    assert all(tensor.is_meta for tensor in (*llava.parameters(), *llava.state_dict().values()))
    assert threading.active_count() == threads


@pytest.mark.golden
def test_a_model_with_fewer_layers_than_slots(text: Any, tmp_path: Path) -> None:
    config = copy.deepcopy(text.llava_config)
    config["text_config"]["num_hidden_layers"] = SKIPPED_LAYERS + 1
    model = write(tmp_path, config, "fp8")
    asked = text.llava_tokenizer, "a boat", PICTURES[0], 4
    with loaded_llava(model, config, torch.float32) as llava:
        expected = prompt_rows(llava, *asked)
    with streamed_llava(model, config, torch.float32) as llava:
        assert torch.equal(prompt_rows(llava, *asked), expected)


@pytest.mark.golden
def test_a_damaged_file_is_an_error_and_leaves_nothing_behind(text: Any, tmp_path: Path) -> None:
    config = with_layers(text.llava_config)
    model = write(tmp_path, config, "fp32")
    file = model.files["text_encoder"]
    threads = threading.active_count()
    without = {name: entry for name, entry in file.entries.items() if "layers.3.mlp" not in name}
    missing = dataclasses.replace(model, files={"text_encoder": dataclasses.replace(file, entries=without)})
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp"), streamed_llava(missing, config, torch.float32):
        pass
    last = file.entries[f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"]
    data = file.path.read_bytes()

    def use() -> Tensor:
        with streamed_llava(model, config, torch.float32) as llava:
            file.path.write_bytes(data[: last.start])
            return prompt_rows(llava, text.llava_tokenizer, "a boat", PICTURES[0], 4)

    with pytest.raises(CheckpointError, match=str(file.path.name)):
        use()
    assert threading.active_count() == threads


@pytest.fixture(scope="module")
def embedding_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedding") / "table.safetensors"
    tensors = random_tensors("text_encoder", {"x": (3,), EMBEDDING: (40, 6), "y": (5, 7)}, torch.float16, 0, CPU)
    write_layout(path, layout("text_encoder", "bf16", tensors), {}, CPU, lambda done: None)
    return path


@given(ids=st.lists(st.integers(0, 39), max_size=60), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_embedding_rows_are_those_of_the_table(embedding_file: Path, ids: list[int], dtype: torch.dtype) -> None:
    file = open_safetensors(embedding_file)
    table = torch.nn.Embedding.from_pretrained(file.read(EMBEDDING).to(dtype))
    rows = EmbeddingRows(file, EMBEDDING, CPU, dtype)
    asked = torch.tensor([ids], dtype=torch.int64)
    assert torch.equal(rows(asked), table(asked))
    assert rows(asked).dtype == dtype
    assert list(rows.parameters()) == []


def test_embedding_rows_that_are_not_there(embedding_file: Path, tmp_path: Path) -> None:
    rows = EmbeddingRows(open_safetensors(embedding_file), EMBEDDING, CPU, torch.float32)
    for strange in (-1, 40, 2**40):
        with pytest.raises(CheckpointError, match=f"token {strange}; .* 40 "):
            rows(torch.tensor([[3, strange]]))
    file = open_safetensors(embedding_file)
    entry = file.entries[EMBEDDING]
    short = tmp_path / "short.safetensors"
    short.write_bytes(embedding_file.read_bytes()[: entry.start + entry.bytes - 1])
    cut = EmbeddingRows(dataclasses.replace(file, path=short), EMBEDDING, CPU, torch.float32)
    assert cut(torch.tensor([38])).shape == (1, 6)
    with pytest.raises(CheckpointError, match="ends inside"):
        cut(torch.tensor([39]))


# What it takes.


def file_bytes(model: ModelFolder) -> dict[str, int]:
    return {name: entry.bytes for name, entry in model.files["text_encoder"].entries.items()}


def test_sizes_that_a_config_leaves_out() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig

    for sizes, defaults in ((_TEXT_SIZES, LlamaConfig()), (_VISION_SIZES, CLIPVisionConfig())):
        assert {name: getattr(defaults, name) for name in sizes} == sizes


@pytest.mark.golden
def test_the_longest_prompt(text: Any) -> None:
    if text.golden.name == "F_text":
        assert text.llava_tokenizer.prefix_length == PREFIX_LENGTH
    images = image_rows(text.llava.config)
    for words in range(0, 300, 7):
        tokens = text.llava_tokenizer.encode("a " * words)
        for stride in (1, 2, 4):
            rows = len(range(0, images, stride)) + len(tokens.text_rows)
            assert rows <= longest_prompt(text.llava_config, stride) <= rows + TEXT_LENGTH
        assert len(tokens.ids) <= PREFIX_LENGTH + TEXT_LENGTH


@pytest.mark.parametrize(("size", "scheme"), [("tiny", scheme) for scheme in SCHEME_NAMES] + [("full", "fp8")])
def test_weights_are_counted_exactly(size: str, scheme: str) -> None:
    """Against the modules as they are built and streamed."""
    config = model_headers(size, VARIANTS["token_replace"], "bf16").header.text_encoder
    entries = {
        tensor.name: TensorEntry(DTYPE_NAMES[tensor.dtype], tensor.shape, 0, tensor.bytes)
        for tensor in stored_as(config, scheme).tensors
    }
    model = folder_of(Path(), SafetensorsFile(Path(), entries, {}))
    llava: Any = model.build("text_encoder", lambda: build_llava(config), llava_tensor_name)
    layers = {f"model.layers.{number}": layer for number, layer in enumerate(llava.language_model.layers)}
    for dtype in (torch.float32, torch.float16):
        loaded = sum(tensor.numel() for name, tensor in llava.state_dict().items() if is_loaded(name))
        expected = loaded * dtype.itemsize, slab_bytes(layers, dtype)
        assert weight_bytes(config, file_bytes(model), dtype.itemsize) == expected


def test_the_released_model_takes_little() -> None:
    model = model_headers("full", VARIANTS["token_replace"], "int8")
    vram, ram = text_bytes(model.header.text_encoder, file_bytes(model), 2)
    assert vram < 1.25 * 2**30
    assert ram < 0.7 * 2**30


# In proportions of the released model: wider than the sequence is long, so that dequantized weights count.
WIDE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.golden
@pytest.mark.parametrize("scheme", ["fp32", "fp8", "nf4"])
def test_the_predicted_peak_is_the_measured_one(text: Any, tmp_path: Path, scheme: str) -> None:
    """On a CPU both kinds of memory are one, and the picture is numpy's."""
    config = with_layers(text.llava_config, **WIDE)
    model = write(tmp_path, config, scheme)

    def encode() -> None:
        with streamed_llava(model, config, torch.float32) as llava:
            prompt_rows(llava, text.llava_tokenizer, "a cat and another one " * 60, PICTURES[0], 4)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        encode()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(accumulate(change for _, change in changes))
    predicted = sum(text_bytes(config, file_bytes(model), 4)) - 4 * 3 * IMAGE_SIZE**2
    assert 0.97 < predicted / peak < 1.03, (predicted, peak)


@pytest.mark.gpu
@pytest.mark.golden
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "nf4"])
def test_on_a_gpu(text: Any, tmp_path: Path, scheme: str) -> None:
    """In 16 bits: the same bits as loaded, and the predicted peak of video memory."""
    config, device = with_layers(text.llava_config, **WIDE), torch.device("cuda")
    model = write(tmp_path, config, scheme)
    prompts = "a boat", "a cat and another one " * 60

    def encode(use: Any) -> list[Tensor]:
        with use(model, config, torch.float16, device) as llava:
            return [prompt_rows(llava, text.llava_tokenizer, prompt, PICTURES[0], 4).cpu() for prompt in prompts]

    expected = encode(loaded_llava)
    assert all(map(torch.equal, encode(streamed_llava), expected))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert all(map(torch.equal, encode(streamed_llava), expected))
    peak = torch.cuda.max_memory_allocated() - before
    predicted, _ = text_bytes(config, file_bytes(model), 2)
    assert 0.95 < predicted / peak < 1.05, (predicted, peak)
