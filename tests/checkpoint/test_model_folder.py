"""Opening a model folder and loading its components: every fault at once, weights only while they are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Made, cut, rewrite
from torch import nn

from lowvram_i2v.checkpoint import COMPONENTS, ModelFolder, component_file, open_model
from lowvram_i2v.convert.shapes import clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.variant import VARIANTS

CPU = torch.device("cpu")


def builders(opened: ModelFolder) -> dict[str, tuple[str, Any, Any]]:
    """What the pipeline loads: module -> component, how to build it, its names in the file."""
    header = opened.header

    def same(name: str) -> str:
        return name

    return {
        "transformer": ("transformer", lambda: HunyuanVideoTransformer(header.transformer), same),
        "encoder": ("vae", lambda: VaeEncoder(header.vae), same),
        "decoder": ("vae", lambda: VaeDecoder(header.vae), same),
        "llava": ("text_encoder", lambda: build_llava(header.text_encoder), llava_tensor_name),
        "clip": ("text_encoder_2", lambda: build_clip(header.text_encoder_2), clip_tensor_name),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_get_the_files_tensors_and_give_them_back(
    variant: str, dtype: torch.dtype | None, model_once: Made
) -> None:
    opened = open_model(model_once(variant, "bf16"))
    for component, build, name_of in builders(opened).values():
        stored = load_file(opened.path / component_file(component))
        with opened.load(component, build, device=CPU, dtype=dtype, file_name=name_of) as module:
            state = module.state_dict()
            assert state
            for name, tensor in state.items():
                expected = stored[name_of(name)]
                assert torch.equal(tensor, expected.to(dtype or expected.dtype)), name
                assert tensor.data_ptr() % 64 == 0  # aligned memory of its own, not a view of the file
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert all(buffer.device == CPU for buffer in module.buffers())
        assert all(parameter.is_meta for parameter in module.parameters())


def test_weights_are_freed_when_the_block_fails(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    kept: list[nn.Module] = []

    def fail() -> None:
        with opened.load("vae", lambda: VaeDecoder(opened.header.vae), device=CPU, dtype=None) as module:
            kept.append(module)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert all(parameter.is_meta for parameter in kept[0].parameters())


def test_loading_inside_inference_mode(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    with (
        torch.inference_mode(),
        opened.load("vae", lambda: VaeDecoder(opened.header.vae), device=CPU, dtype=torch.float32) as decoder,
    ):
        assert decoder.decode(torch.zeros(16, 1, 2, 2)).shape == (3, 1, 16, 16)


def test_loading_a_module_that_does_not_fit(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    loading = opened.load("vae", lambda: nn.Linear(3, 3), device=CPU, dtype=None)
    with pytest.raises(CheckpointError, match=r"missing: weight \[3, 3\]\n  - missing: bias"):
        loading.__enter__()


def expected_shapes(opened: ModelFolder) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        "transformer": transformer_shapes(opened.header.transformer),
        "vae": vae_shapes(opened.header.vae),
        "text_encoder": llava_shapes(opened.header.text_encoder),
        "text_encoder_2": clip_shapes(opened.header.text_encoder_2),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_folder_passes_its_own_check(variant: str, model_once: Made) -> None:
    opened = open_model(model_once(variant, "bf16"))
    assert opened.shapes("transformer") == transformer_shapes(opened.header.transformer)
    opened.check(expected_shapes(opened))


def test_check_lists_every_tensor_of_every_component(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    expected = expected_shapes(opened)
    expected["vae"]["encoder.conv_in.conv.bias"] = (33,)
    expected["vae"]["lost"] = (2, 3)
    del expected["transformer"]["img_in.proj.bias"]
    del expected["text_encoder"]["model.norm.weight"]
    with pytest.raises(CheckpointError) as caught:
        opened.check(expected, extra_ok=lambda component, name: component == "text_encoder")
    lines = str(caught.value).splitlines()
    assert "  - vae.safetensors: missing: lost [2, 3]" in lines
    assert "  - vae.safetensors: wrong shape: encoder.conv_in.conv.bias is [32], must be [33]" in lines
    assert "  - transformer.safetensors: unexpected: img_in.proj.bias" in lines
    assert "model.norm.weight" not in str(caught.value)


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    for part in parts:
        assert part in str(caught.value)


def test_folders_that_are_no_model(tmp_path: Path, released: Path) -> None:
    for folder in (tmp_path / "none", tmp_path, released):
        assert_refused(folder, "is not a model folder", "lowvram-i2v convert")


def test_everything_missing_is_listed_at_once(model: Path) -> None:
    values = json.loads((model / "model.json").read_text())
    del values["components"]["text_encoder_2"]
    rewrite(model / "model.json", json.dumps(values).encode())
    (model / "vae.safetensors").unlink()
    (model / "tokenizer" / "tokenizer.json").unlink()
    cut(model / "transformer.safetensors", 1)
    assert_refused(
        model,
        "text_encoder_2: not converted yet",
        "vae.safetensors: no such file",
        "tokenizer/: neither tokenizer.json",
        "transformer.safetensors: 18586431 bytes, but 18586432 were written",
    )


def test_a_damaged_header_of_the_right_length(model: Path) -> None:
    data = (model / "vae.safetensors").read_bytes()
    rewrite(model / "vae.safetensors", data[:8] + b"[" + data[9:])
    assert_refused(model, "vae.safetensors", "damaged")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format_version": 1}',
        '{"format_version": 1, "variant": "t2v", "components": {}}',
        '{"format_version": 1, "variant": null, "components": {"lora": {}}}',
        '{"format_version": 1, "variant": null, "components": {"vae": {}}}',
        '{"format_version": 1, "variant": null, "components": {"vae": 3}}',
        '{"format_version": 1, "variant": null, "components": []}',
        '{"format_version": 1, "variant": [], "components": {}}',
        '{"format_version": 1, "variant": null, '
        '"components": {"vae": {"config": [], "scheme": "bf16", "bytes": 1, "source": {}}}}',
    ],
)
def test_a_damaged_model_json(text: str, model: Path) -> None:
    rewrite(model / "model.json", text.encode())
    assert_refused(model, "model.json")


def change_record(model: Path, component: str, config: dict[str, Any]) -> None:
    values = json.loads((model / "model.json").read_text())
    values["components"][component]["config"] |= config
    rewrite(model / "model.json", json.dumps(values).encode())


def test_another_format_version(model: Path) -> None:
    values = json.loads((model / "model.json").read_text()) | {"format_version": 2}
    rewrite(model / "model.json", json.dumps(values).encode())
    assert_refused(model, "format version 2", "reads version 1")


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_configs_with_unknown_keys(component: str, model: Path) -> None:
    change_record(model, component, {"window": 7})
    assert_refused(model, "window")


def test_components_that_do_not_fit_each_other(model: Path) -> None:
    change_record(model, "transformer", {"text_dim": 4096, "pooled_dim": 768, "in_channels": 33})
    change_record(model, "vae", {"latent_channels": 4})
    assert_refused(
        model,
        "text_encoder: model.embed_tokens.weight is [1024, 64], but the transformer expects width 4096",
        "expects width 768",
        "vae: 4 latent channels, transformer: 16",
        "transformer: 33 input channels, but the variant is token_replace (16)",
    )


def test_a_file_of_another_model_in_the_folder(model: Path) -> None:
    path = model / "vae.safetensors"
    tensors = load_file(path)
    tensors["extra"] = torch.zeros(1)
    path.unlink()
    save_file(tensors, path)
    assert_refused(model, "vae.safetensors", "were written")


def test_opening_imports_no_torch(model_once: Made) -> None:
    script = f"""
import sys
from pathlib import Path
from lowvram_i2v.checkpoint import open_model
open_model(Path({str(model_once("token_replace", "bf16"))!r}))
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_the_files_of_a_model(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    assert set(opened.files) == set(COMPONENTS)
    assert (opened.tokenizer / "tokenizer.json").is_file()
    assert (opened.tokenizer_2 / "vocab.json").is_file()
    for component, record in opened.header.records.items():
        assert record.bytes == (opened.path / component_file(component)).stat().st_size
