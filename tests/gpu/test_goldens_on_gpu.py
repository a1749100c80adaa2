"""The goldens on a CUDA device, in the dtypes that a run uses there, and the whole path on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from goldens import golden, names, relative_l2, transformer_config, transformer_weights, weights
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", names("A_", "B_"))
def test_transformer(name: str, dtype: torch.dtype, gate: float) -> None:
    case = golden(name)
    state = transformer_weights(case.info)
    with torch.device("meta"):
        model = HunyuanVideoTransformer(transformer_config(case.info, state))
    model.load_state_dict(state, assign=True)
    model = model.to("cuda", dtype).eval()
    valid = int(case["in.text_mask"][0].sum())
    inputs = [
        case["in.x"][0],
        case["in.t"],
        case["in.text_states"][0, :valid],
        case["in.text_states_2"][0],
        case["in.guidance"] / 1000,
    ]
    rope = (case["in.freqs_cos"][:, ::2].cuda(), case["in.freqs_sin"][:, ::2].cuda())
    with torch.no_grad():
        out = model(*[tensor.cuda() for tensor in inputs], rope)
    assert relative_l2(out[None].cpu(), case["out"]) < gate


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
def test_vae(dtype: torch.dtype, gate: float) -> None:
    case = golden(names("E_vae_plain")[0])
    config = VaeConfig.from_official(case.info["config"])
    state = weights(case.info["weights"]["file"])
    encoder, decoder = VaeEncoder(config), VaeDecoder(config)
    for module in (encoder, decoder):
        module.load_state_dict({name: state[name] for name in module.state_dict()})
        module.to("cuda", dtype).eval()
    with torch.no_grad():
        mean, _ = encoder.encode(case["in.image"][0].cuda())
        frames = decoder.decode(case["in.latent"][0].cuda())
    assert relative_l2(mean[None].cpu(), case["out.image_mean"]) < gate
    assert relative_l2(frames[None].cpu(), case["out.decoded"]) < gate


@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
def test_whole_path_on_a_tiny_model(variant: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "lowvram_i2v", *arguments], cwd=root, check=True)

    from lowvram_i2v.sample_photo import draw_sample_photo

    draw_sample_photo(320, 200).save(tmp_path / "photo.png")
    run("synth", str(tmp_path / "released"), "--variant", variant)
    run("convert", str(tmp_path / "released"), str(tmp_path / "model"))
    flags = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "photo.png"), "--prompt", "It moves."]
    output = tmp_path / "out.mp4"
    run("generate", *flags, "--size", "128x96", "--frames", "17", "--steps", "2", "--cfg", "2", "--output", str(output))
    about = json.loads((tmp_path / "out.mp4.json").read_text())["about"]
    assert output.stat().st_size > 1000
    assert about["variant"] == variant
