"""Computing every step's modulation before the loop changes nothing, and needs no weight that the loop uses."""

from __future__ import annotations

import pytest
import torch

from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer

SIZES = {"hidden_size": 256, "heads": 2, "double_blocks": 2, "single_blocks": 3, "text_dim": 20, "pooled_dim": 12}
CONCAT = {"in_channels": 33, "guidance_embed": False}


@pytest.mark.parametrize("changes", [{}, CONCAT])
@pytest.mark.parametrize("steps", [1, 7])
def test_all_steps_at_once_equal_each_by_itself(changes: dict[str, object], steps: int) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(**SIZES, **changes)
    model = HunyuanVideoTransformer(config).eval()
    text, pooled = torch.randn(9, 20), torch.randn(12)
    guidance = torch.tensor([6.0]) if config.guidance_embed else None
    timesteps = torch.linspace(1000, 100, steps)
    latents, rope = torch.randn(config.in_channels, 2, 4, 6), rope_table((2, 2, 3), config.rope_dims, 256.0, 5)
    with torch.no_grad():
        table = model.condition(timesteps, text, pooled, guidance)
        assert len(table) == steps
        for i, step in enumerate(table):
            alone = model(latents, timesteps[i : i + 1], text, pooled, guidance, rope)
            hoisted = model.predict(latents, step, rope)
            assert (hoisted - alone).norm() / alone.norm() < 1e-6


def test_gradients_pass_through_the_packed_tensor() -> None:
    config = TransformerConfig(**SIZES)
    model = HunyuanVideoTransformer(config)
    rope = rope_table((2, 2, 2), config.rope_dims, 256.0, 5)
    out = model(
        torch.randn(16, 2, 4, 4), torch.tensor([500.0]), torch.randn(5, 20), torch.randn(12), torch.ones(1), rope
    )
    out.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_the_loop_and_what_comes_before_it_share_no_weight() -> None:
    """Each half runs with the other half's weights missing."""
    torch.manual_seed(1)
    config = TransformerConfig(**SIZES)
    whole = HunyuanVideoTransformer(config).eval()
    halves = []
    for wanted in (True, False):
        with torch.device("meta"):
            half = HunyuanVideoTransformer(config).eval()
        state = {name: value for name, value in whole.state_dict().items() if is_conditioning(name) is wanted}
        half.load_state_dict(state, strict=False, assign=True)
        halves.append(half)
    before, loop = halves
    arguments = torch.tensor([300.0]), torch.randn(6, 20), torch.randn(12), torch.ones(1)
    latents, rope = torch.randn(16, 2, 4, 4), rope_table((2, 2, 2), config.rope_dims, 256.0, 5)
    with torch.no_grad():
        assert torch.equal(
            loop.predict(latents, before.condition(*arguments)[0], rope), whole(latents, *arguments, rope)
        )


def test_what_is_hoisted_at_full_size() -> None:
    with torch.device("meta"):
        sizes = {
            name: value.numel() for name, value in HunyuanVideoTransformer(TransformerConfig()).state_dict().items()
        }
    blocks = {name: size for name, size in sizes.items() if "_blocks." in name and name.endswith(".weight")}
    hoisted = sum(size for name, size in blocks.items() if is_conditioning(name))
    assert hoisted == pytest.approx(3.40e9, rel=0.01)
    assert sum(blocks.values()) == pytest.approx(12.46e9, rel=0.01)
