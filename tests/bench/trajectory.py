"""The error of a whole transformer call, flavour by flavour, along a trajectory: `python tests/bench/trajectory.py`.

The reference (bf16 weights, 16-bit products, torch's attention) goes from noise to latents and keeps what it saw and
said in every step. Every other way to compute then gets the reference's latents in each step (teacher-forced: its own
errors do not add up) and is compared by its velocity, the first frame left out where the model's input replaces it.
Prints one table row for each flavour: relative L2, mean and largest over the steps, and the mean of each tenth.

    --model tiny      the goldens' transformer, its block matrices redrawn as Gaussians; a CPU does
    --model random    the released model's sizes with random weights, made on the device: no file is read
    --model DIR ...   model folders, one a scheme; the reference is bf16 if it is among them, else int8 w8a16

On the CPU all is computed in float32 and kernels are stood for by their definitions: 8-bit attention as RTX 40 and
later compute it, sparse attention without its 8 bits.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lowvram_i2v import attention  # noqa: E402
from lowvram_i2v.checkpoint import ModelFolder  # noqa: E402
from lowvram_i2v.convert.policy import layout, quantizable  # noqa: E402
from lowvram_i2v.convert.shapes import transformer_shapes  # noqa: E402
from lowvram_i2v.convert.sources import LazyTensor  # noqa: E402
from lowvram_i2v.device import compute_dtype, describe, pick_device, release  # noqa: E402
from lowvram_i2v.dit.config import TransformerConfig  # noqa: E402
from lowvram_i2v.dit.rope import rope_table, token_grid  # noqa: E402
from lowvram_i2v.dit.token_order import TokenOrder, token_order  # noqa: E402
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer  # noqa: E402
from lowvram_i2v.dit.workspace import Chunking, Workspace  # noqa: E402
from lowvram_i2v.kernels import attention_reference as definition  # noqa: E402
from lowvram_i2v.kernels.ops import choose  # noqa: E402
from lowvram_i2v.kernels.quant_linear import quantized_parts, set_compute, swap_linears  # noqa: E402
from lowvram_i2v.kernels.scheme import SCHEMES  # noqa: E402
from lowvram_i2v.sampling.conditioning import condition, draw_noise, start_latents  # noqa: E402
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise  # noqa: E402
from lowvram_i2v.sampling.schedule import flow_sigmas, timesteps_of  # noqa: E402
from lowvram_i2v.synth.weights import spread  # noqa: E402
from lowvram_i2v.variant import VARIANTS  # noqa: E402

FLAVOURS = (
    "bf16:w8a16:triton-int8 bf16:w8a16:triton-sparse "
    "int8:w8a16:sdpa int8:w8a8:sdpa int8:w8a8:triton-int8 int8:w8a8:triton-sparse "
    "fp8:w8a16:sdpa fp8:w8a8:sdpa fp8:w8a8:triton-int8 nf4:w8a16:sdpa"
)
SHIFT, GUIDANCE, TENTHS = 7.0, 6.0, 10
Opened = Callable[[str], AbstractContextManager[HunyuanVideoTransformer]]
"""Scheme -> the transformer in it, all weights on the device while a `with` lasts."""


@dataclass(frozen=True)
class Flavour:
    """scheme: how weights are stored. compute: how they multiply. attention: a backend."""

    scheme: str
    compute: str
    attention: str


@dataclass(frozen=True)
class Setting:
    """What all flavours share. noise [16, T, H, W]; image_latent [16, 1, H, W]; prompt [tokens, text_dim]."""

    config: TransformerConfig
    device: torch.device
    dtype: torch.dtype
    sigmas: Tensor
    noise: Tensor
    image_latent: Tensor
    prompt: Tensor
    pooled: Tensor
    rope: tuple[Tensor, Tensor]
    order: TokenOrder
    work: Workspace
    density: float
    after: float


@dataclass(frozen=True)
class Trajectory:
    """The model's input and the velocity of each step, on the CPU."""

    inputs: list[Tensor]
    velocities: list[Tensor]


def make_setting(config: TransformerConfig, device: torch.device, options: argparse.Namespace) -> Setting:
    dtype = compute_dtype(device, torch.bfloat16)
    width, height = (int(side) for side in options.size.split("x"))
    grid = token_grid(options.frames, height, width)
    _, ph, pw = config.patch_size
    cos, sin = rope_table(grid, config.rope_dims, config.rope_theta, options.frames)
    generator = torch.Generator().manual_seed(3)
    text = options.text_tokens
    return Setting(
        config=config,
        device=device,
        dtype=dtype,
        sigmas=flow_sigmas(options.steps, SHIFT),
        noise=draw_noise((config.out_channels, grid[0], grid[1] * ph, grid[2] * pw), 0),
        image_latent=torch.randn(config.out_channels, 1, grid[1] * ph, grid[2] * pw, generator=generator),
        prompt=torch.randn(text, config.text_dim, generator=generator).to(device),
        pooled=torch.randn(config.pooled_dim, generator=generator).to(device),
        rope=(cos.to(device), sin.to(device)),
        order=token_order(grid, config.patch_size).to(device),
        work=Workspace(config, len(cos), text, Chunking(4096, config.heads), device, dtype, choose(device)),
        density=options.density,
        after=options.after,
    )


def velocity_of(transformer: HunyuanVideoTransformer, flavour: Flavour, setting: Setting) -> GuidedVelocity:
    """(latents, step) -> velocity, as a run computes it."""
    by_layout = attention.by_layout(flavour.attention, setting.density, setting.after)
    order = None if by_layout is None else setting.order
    transformer.attend = backend(flavour.attention, setting.device)
    guidance = torch.tensor([GUIDANCE], device=setting.device) if setting.config.guidance_embed else None
    timesteps = timesteps_of(setting.sigmas).to(setting.device)
    set_compute(transformer, "w8a16")  # as before the loop
    steps = transformer.condition(timesteps, setting.prompt, setting.pooled, guidance)
    set_compute(transformer, flavour.compute)
    rope = setting.rope if order is None else order.rope(setting.rope)
    return GuidedVelocity(transformer, steps, None, 1.0, rope, None, setting.work, attention=by_layout, order=order)


def backend(name: str, device: torch.device) -> attention.AttentionBackend:
    """The backend, or on a CPU what stands for it."""
    return eight_bit if name == "triton-int8" and device.type == "cpu" else attention.get(name)


def eight_bit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `triton-int8` computes with e4m3 values, in plain torch."""
    tokens, _, dim = q.shape
    q_codes, q_scale = definition.quantize_queries(q.transpose(0, 1))
    k_codes, k_scale = definition.quantize_keys(k, k.float().mean(0), 64)
    scores = q_codes.float() @ k_codes[:, :tokens].float().transpose(1, 2)
    scores *= (q_scale * dim**-0.5)[..., None] * k_scale.repeat_interleave(64, 1)[:, None, :tokens]
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    centre = v.float().mean(0)
    scale = ((v.float() - centre).abs().amax(0) / 448).clamp_min(2.0**-60)
    values = ((v.float() - centre) / scale).to(torch.float8_e4m3fn).float().transpose(0, 1)
    sums = (256 * p).to(torch.float8_e4m3fn).float() @ values / (256 * p.sum(-1, keepdim=True))
    return (sums.transpose(0, 1) * scale + centre).to(q.dtype)


@torch.inference_mode()
def reference(transformer: HunyuanVideoTransformer, flavour: Flavour, setting: Setting) -> Trajectory:
    velocity, made = velocity_of(transformer, flavour, setting), Trajectory([], [])

    def recorded(model_input: Tensor, step: int) -> Tensor:
        result = velocity(model_input, step)
        made.inputs.append(model_input.cpu())
        made.velocities.append(result.cpu())
        return result

    variant = next(v for v in VARIANTS.values() if v.in_channels == setting.config.in_channels)
    start = start_latents(setting.noise, setting.image_latent, stability=True).to(setting.device)
    image = condition(variant, setting.image_latent.to(setting.device))
    denoise(recorded, image, start, setting.sigmas, lambda *_: None)
    return made


@torch.inference_mode()
def errors(
    transformer: HunyuanVideoTransformer, flavour: Flavour, setting: Setting, made: Trajectory, every: int
) -> dict[int, float]:
    """Step -> relative L2 distance of the velocities."""
    velocity = velocity_of(transformer, flavour, setting)
    first = int(setting.config.replaces_first_frame)
    found = {}
    for step in range(0, len(made.inputs), every):
        expected = made.velocities[step].to(setting.device)[:, first:]
        actual = velocity(made.inputs[step].to(setting.device), step)[:, first:]
        found[step] = (actual - expected).norm() / expected.norm()
    return {step: float(error) for step, error in found.items()}


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def print_errors(flavour: Flavour, found: dict[int, float], steps: int) -> None:
    def percent(values: list[float]) -> str:
        return f"{100 * sum(values) / len(values):.2f}" if values else ""

    tenths = [[e for step, e in found.items() if step * TENTHS // steps == tenth] for tenth in range(TENTHS)]
    every = list(found.values())
    row(
        flavour.scheme, flavour.compute, flavour.attention, percent(every), percent([max(every)]), *map(percent, tenths)
    )


def gaussian(name: str, shape: tuple[int, ...], std: float, mean: float, device: torch.device) -> Tensor:
    """bfloat16 values that depend on the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(mean, std, generator=generator)


def tiny() -> tuple[TransformerConfig, dict[str, LazyTensor]]:
    """The goldens' model: sizes, and weights as they would be stored in a released file."""
    from goldens import golden, transformer_config, transformer_weights

    info = golden("A_transformer_token_replace").info
    state = transformer_weights(info)
    matrices = {
        f"{layer}.weight" for layer in quantizable("transformer", {n: tuple(t.shape) for n, t in state.items()})
    }

    def read(name: str) -> Tensor:
        value = state[name]
        if name in matrices:
            return gaussian(name, tuple(value.shape), float(value.std()), 0.0, torch.device("cpu"))
        return value.bfloat16()

    tensors = {n: LazyTensor(tuple(t.shape), torch.bfloat16, partial(read, n)) for n, t in state.items()}
    return transformer_config(info, state), tensors


def released_size(device: torch.device) -> tuple[TransformerConfig, dict[str, LazyTensor]]:
    """The released sizes, with weights that are drawn on the device whenever they are read."""
    config = TransformerConfig()

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        mean, std = spread(name, shape)
        return gaussian(name, shape, std, mean, device)

    shapes = transformer_shapes(config)
    return config, {n: LazyTensor(tuple(s), torch.bfloat16, partial(read, n, tuple(s))) for n, s in shapes.items()}


@contextmanager
def in_memory(
    config: TransformerConfig,
    tensors: Mapping[str, LazyTensor],
    device: torch.device,
    dtype: torch.dtype,
    scheme: str,
) -> Iterator[HunyuanVideoTransformer]:
    """The transformer that a conversion of these tensors would give, without a file."""
    layers = set(
        quantizable("transformer", {name: t.shape for name, t in tensors.items()}) if scheme in SCHEMES else ()
    )
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer(config)
    swap_linears(transformer, lambda name: SCHEMES[scheme] if name in layers else None)
    fixed, wanted, state = quantized_parts(transformer), transformer.state_dict().keys(), {}
    for job in layout("transformer", scheme, tensors).jobs:
        parts = {name: value for name, value in job.produce().items() if name in wanted}
        state |= {name: value.to(device, fixed.get(name, dtype)) for name, value in parts.items()}
    transformer.load_state_dict(state, assign=True)
    state.clear()
    yield transformer.eval().requires_grad_(False)
    transformer.to("meta")


def in_folders(folders: list[Path]) -> tuple[TransformerConfig, dict[str, ModelFolder]]:
    """Scheme -> model folder; only their transformers need to be there."""
    from bench.streaming import open_transformer

    models = [open_transformer(folder) for folder in folders]
    return models[0].header.transformer, {model.header.scheme: model for model in models}


def sources(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[TransformerConfig, Opened, str, set[str]]:
    """Sizes, how a scheme is opened, the reference's scheme, and the schemes that there are."""
    if options.model in (["tiny"], ["random"]):
        config, tensors = tiny() if options.model == ["tiny"] else released_size(device)
        return config, partial(in_memory, config, tensors, device, dtype), "bf16", {"bf16", *SCHEMES}
    config, models = in_folders([Path(name) for name in options.model])

    def opened(scheme: str) -> AbstractContextManager[HunyuanVideoTransformer]:
        build = partial(HunyuanVideoTransformer, config)
        return models[scheme].load("transformer", build, device=device, dtype=dtype)

    return config, opened, "bf16" if "bf16" in models else "int8", set(models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], metavar="tiny|random|DIR")
    parser.add_argument("--flavours", nargs="+", default=FLAVOURS.split(), metavar="SCHEME:COMPUTE:ATTENTION")
    parser.add_argument("--size", default="192x128", help="WIDTHxHEIGHT (default %(default)s)")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--text-tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=1, help="compare one step in so many")
    parser.add_argument("--density", type=float, default=0.2, help="of sparse attention")
    parser.add_argument("--after", type=float, default=0.2, help="share of the steps that run dense before it")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    start, device = time.monotonic(), pick_device(options.device)
    dtype = compute_dtype(device, torch.bfloat16)
    config, opened, base, schemes = sources(options, device, dtype)
    setting = make_setting(config, device, options)
    flavours = [Flavour(*text.split(":")) for text in options.flavours]
    tokens = f"{len(setting.rope[0])} + {options.text_tokens} tokens"
    print(f"{' '.join(options.model)}, {options.size}x{options.frames}, {tokens}, {describe(device)}")
    print(f"{options.steps} steps, of which every {options.every}. is compared")
    print(f"reference: {base} weights, w8a16, sdpa; sparse: density {options.density}, after {options.after}\n")
    row("weights", "compute", "attention", "mean %", "max %", *(f"{10 * n}-{10 * n + 10} %" for n in range(TENTHS)))
    row(*["---"] * (5 + TENTHS))
    with opened(base) as transformer:
        made = reference(transformer, Flavour(base, "w8a16", "sdpa"), setting)
    for scheme in dict.fromkeys(flavour.scheme for flavour in flavours if flavour.scheme in schemes):
        release(device)
        with opened(scheme) as transformer:
            for flavour in (flavour for flavour in flavours if flavour.scheme == scheme):
                print_errors(flavour, errors(transformer, flavour, setting, made, options.every), options.steps)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
