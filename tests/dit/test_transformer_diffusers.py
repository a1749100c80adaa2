"""The transformer against diffusers' class, on random weights carried over by the name table of `convert`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram_i2v.convert.names import DIFFUSERS, SWAPPED, from_official, row_counts
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer

SIZES = TransformerConfig(
    hidden_size=256, heads=2, double_blocks=2, single_blocks=3, text_dim=40, pooled_dim=24, refiner_blocks=2
)
CONCAT = {"in_channels": 33, "guidance_embed": False}


def random_model(config: TransformerConfig, seed: int) -> HunyuanVideoTransformer:
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
        if parameter.dim() == 1:
            parameter.data += 0.5
    return model


def diffusers_state(model: HunyuanVideoTransformer) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        parts = from_official(DIFFUSERS, name)
        if name.startswith(SWAPPED):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        rows = row_counts(len(parts), len(tensor), model.config.hidden_size) if len(parts) > 1 else [len(tensor)]
        state.update(zip(parts, tensor.split(rows), strict=True))
    return state


@pytest.mark.parametrize(("variant", "changes"), [("token_replace", {}), ("latent_concat", CONCAT)])
def test_output_agrees(variant: str, changes: dict[str, object]) -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    config = TransformerConfig(**{**SIZES.to_dict(), **changes})
    model = random_model(config, seed=3)
    theirs = HunyuanVideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        num_refiner_layers=config.refiner_blocks,
        mlp_ratio=config.mlp_ratio,
        patch_size=config.patch_size[1],
        patch_size_t=config.patch_size[0],
        guidance_embeds=config.guidance_embed,
        text_embed_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        rope_theta=config.rope_theta,
        rope_axes_dim=config.rope_dims,
        image_condition_type=variant,
    ).eval()
    theirs.load_state_dict(diffusers_state(model), strict=True)

    torch.manual_seed(4)
    latents, text, pooled = torch.randn(config.in_channels, 3, 6, 10), torch.randn(11, 40), torch.randn(24)
    # small scalars: of large ones the last bit of a frequency counts, and diffusers' depends on the math library
    time = torch.tensor([65.0])
    guidance = torch.tensor([0.05]) if config.guidance_embed else None
    with torch.no_grad():
        rope = rope_table((3, 3, 5), config.rope_dims, config.rope_theta, frames=9)
        ours = model(latents, time, text, pooled, guidance, rope)
        expected = theirs(
            hidden_states=latents[None],
            timestep=time.long(),
            encoder_hidden_states=text[None],
            encoder_attention_mask=torch.ones(1, len(text)),
            pooled_projections=pooled[None],
            guidance=None if guidance is None else guidance * 1000,
        ).sample[0]
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
