"""`verify` and `inspect`: what they say is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TRANSFORMER, VAE, Made, cut, rewrite

from lowvram_i2v.checkpoint import COMPONENTS, component_file
from lowvram_i2v.cli import main
from lowvram_i2v.convert import verify as verify_module
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.inspect import inspect
from lowvram_i2v.convert.verify import verify
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.safetensors_file import open_safetensors


def test_a_whole_folder_verifies(model_once: Made) -> None:
    folder = model_once("token_replace", "int8")
    report = verify(folder)
    assert not report.damaged
    assert report.checked == {
        component: len(open_safetensors(folder / component_file(component)).entries) for component in COMPONENTS
    }
    assert main(["verify", str(folder)]) == 0


def test_one_flipped_bit_is_found(model: Path) -> None:
    entry = open_safetensors(model / "vae.safetensors").entries["decoder.conv_out.conv.weight"]
    data = bytearray((model / "vae.safetensors").read_bytes())
    data[entry.start + entry.bytes // 2] ^= 4
    rewrite(model / "vae.safetensors", bytes(data))
    assert verify(model).damaged == ("vae: decoder.conv_out.conv.weight",)
    assert main(["verify", str(model)]) == 1


def test_a_tokenizer_that_does_not_open_is_found(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (model / "tokenizer_2").iterdir():
        path.unlink()
    rewrite(model / "tokenizer" / "tokenizer.json", b"{")
    assert [name.partition(":")[0] for name in verify(model).damaged] == ["text_encoder", "text_encoder_2"]
    assert main(["verify", str(model), "--component", "text"]) == 1
    assert "tokenizer.json" in capsys.readouterr().out
    assert main(["verify", str(model), "--component", "vae"]) == 0


@pytest.mark.parametrize(
    ("scheme", "low", "high"), [("int8", 0.005, 0.012), ("fp8", 0.025, 0.028), ("nf4", 0.088, 0.096)]
)
def test_errors_against_the_source(scheme: str, low: float, high: float, released_once: Made, model_once: Made) -> None:
    report = verify(model_once("token_replace", scheme), released_once("token_replace"), ["transformer"])
    assert len(report.errors) == 26
    assert all(low < error < high for error in report.errors.values()), report.errors
    assert report.block_error is not None
    assert 0 < report.block_error < high
    lines = report.lines(rows=3)
    shown = [
        float(line.split("%")[0]) for line in lines if line.lstrip()[0].isdigit() and "blocks" in line and "%  " in line
    ]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == 3


def test_a_16_bit_folder_equals_its_source(released_once: Made, model_once: Made) -> None:
    report = verify(model_once("latent_concat", "bf16"), released_once("latent_concat"), ["transformer", "vae"])
    assert report.errors == {}
    assert report.equal > 300
    assert report.block_error == 0


def test_against_a_file_that_holds_one_component(model_once: Made, released_once: Made, tmp_path: Path) -> None:
    folder, source = model_once("token_replace", "bf16"), released_once("token_replace")
    report = verify(folder, source / TRANSFORMER)
    assert set(report.checked) == set(COMPONENTS)
    assert report.equal == len(open_safetensors(folder / "transformer.safetensors").entries)
    assert verify(folder, source / VAE, ["vae"]).equal > 100
    with pytest.raises(CheckpointError, match="holds vae, not text_encoder_2"):
        verify(folder, source / VAE, ["text_encoder_2"])
    convert(source, tmp_path / "model", "bf16", ["vae"])
    with pytest.raises(CheckpointError, match="holds transformer, not vae"):
        verify(tmp_path / "model", source / TRANSFORMER)


def test_the_source_is_looked_at_before_checksums_are_read(
    model_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> str:
        raise AssertionError("a checksum was read")

    monkeypatch.setattr(verify_module, "_checksum", read)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(model_once("token_replace", "bf16"), tmp_path / "nothing")


def test_wrong_calls(model_once: Made, released_once: Made, tmp_path: Path) -> None:
    folder = model_once("token_replace", "bf16")
    with pytest.raises(RequestError):
        verify(folder, folder)
    with pytest.raises(CheckpointError, match="not a model folder"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        verify(folder, released_once("latent_concat"), ["transformer"])


def test_inspect_a_released_tree(released_once: Made) -> None:
    text = "\n".join(inspect(released_once("token_replace")))
    assert "official names, torch pickle" in text
    assert "variant: token_replace" in text
    assert "26 layers become int8" in text
    assert "the released tree" in text
    assert "complete" in text


def test_inspect_says_what_is_missing(released: Path) -> None:
    (released / "text_encoder_i2v" / "config.json").unlink()
    (released / TRANSFORMER).unlink()
    text = "\n".join(inspect(released))
    assert "mp_rank_00_model_states.pt" in text
    assert "complete: " not in text


def test_inspect_a_model_folder(model: Path) -> None:
    assert "complete: " in "\n".join(inspect(model))
    cut(model / "vae.safetensors", 5)
    text = "\n".join(inspect(model))
    assert "truncated" in text
    assert "not complete" in text


def test_inspect_a_single_file(model_once: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model_once("token_replace", "fp8") / "transformer.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "27 F8_E4M3" in text  # and the marker
    assert "--variant" in text  # 16 channels: could be text-to-video
    save_file({"a": torch.zeros(2)}, tmp_path / "y.safetensors")
    assert "refuses" in "\n".join(inspect(tmp_path / "y.safetensors"))
    (tmp_path / "z.safetensors").write_bytes(b"no weights")
    assert main(["inspect", str(tmp_path / "z.safetensors")]) == 1
    assert main(["inspect", str(tmp_path / "nothing")]) == 1


def test_folders_without_checksums_are_read(model: Path) -> None:
    """Those of version 0.1."""
    values = json.loads((model / "model.json").read_text())
    for record in values["components"].values():
        del record["checksums"]
    rewrite(model / "model.json", json.dumps(values).encode())
    assert verify(model).checked == dict.fromkeys(COMPONENTS, 0)
