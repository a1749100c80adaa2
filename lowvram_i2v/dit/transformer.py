"""The HunyuanVideo-I2V diffusion transformer, in plain torch: read `forward` from top to bottom.

Invariants: tensor names are those of the released checkpoint (856 for token_replace, 852 for latent_concat without a
guidance embedder); one sample, no padding, so no mask anywhere; nothing is changed in place, so that training can use
it. Left out here: streaming, quantized weights, chunked activations.

Source: HunyuanVideo, arXiv 2412.03603; the arithmetic is pinned by the goldens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from lowvram_i2v.attention import AttentionBackend
from lowvram_i2v.attention.sdpa import attend as sdpa
from lowvram_i2v.dit.blocks import DoubleBlock, Rope, SingleBlock
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.embedders import PatchEmbedder, PooledEmbedder, ScalarEmbedder, TokenRefiner
from lowvram_i2v.kernels.modulate import layer_norm_modulate


class HunyuanVideoTransformer(nn.Module):
    """Predicts the flow velocity of latents, given time, prompt and (inside the latents) the first frame."""

    def __init__(self, config: TransformerConfig, attend: AttentionBackend = sdpa) -> None:
        super().__init__()
        self.config = config
        self.attend = attend
        hidden = config.hidden_size
        self.img_in = PatchEmbedder(config)
        self.txt_in = TokenRefiner(config)
        self.time_in = ScalarEmbedder(hidden)
        self.vector_in = PooledEmbedder(config.pooled_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = ScalarEmbedder(hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        guidance_scale: Tensor | None,
        rope: Rope,
    ) -> Tensor:
        """latents [in_channels, T, H, W] -> velocity [out_channels, T, H, W], float32.

        timestep: [1], on the scale 0..1000. prompt_embeds: [text tokens, text_dim]. pooled_prompt_embeds: [pooled_dim].
        guidance_scale: [1] as the user means it (6.0), None if the weights have no guidance embedder.
        rope: `rope_table` of the token grid T x H/2 x W/2.
        """
        dtype = self.img_in.proj.weight.dtype
        prompt_embeds, pooled = prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype)[None]
        grid = [size // patch for size, patch in zip(latents.shape[1:], self.config.patch_size, strict=True)]
        vectors = self.vectors(timestep, pooled, guidance_scale)
        first_tokens = grid[1] * grid[2] if len(vectors) == 2 else 0

        img = self.img_in(latents.to(dtype))
        txt = self.txt_in(prompt_embeds, timestep, self.attend)
        for block in self.double_blocks:
            img, txt = block(img, txt, block.modulation(vectors), first_tokens, rope, self.attend)  # type: ignore[operator]
        x = torch.cat([img, txt])
        for block in self.single_blocks:
            x = block(x, block.modulation(vectors), first_tokens, rope, self.attend)  # type: ignore[operator]
        return self.unpatchify(self.final_layer(x[: len(img)], vectors[:1]), grid)

    def vectors(self, timestep: Tensor, pooled: Tensor, guidance_scale: Tensor | None) -> Tensor:
        """What modulates the blocks: [1 or 2, hidden]. Row 0 serves all tokens; row 1, where the image latent replaces
        the first frame, serves that frame's tokens: time 0, and no guidance."""
        prompt = self.vector_in(pooled)
        vector = self.time_in(timestep) + prompt
        if guidance_scale is not None:
            vector = vector + self.guidance_in(guidance_scale * 1000)
        if not self.config.replaces_first_frame:
            return vector  # type: ignore[no-any-return]
        return torch.cat([vector, self.time_in(torch.zeros_like(timestep)) + prompt])

    def unpatchify(self, tokens: Tensor, grid: list[int]) -> Tensor:
        """[tokens, channels * patch] -> [channels, T, H, W], float32."""
        (t, h, w), (pt, ph, pw) = grid, self.config.patch_size
        pattern = "(t h w) (c pt ph pw) -> c (t pt) (h ph) (w pw)"
        video: Tensor = rearrange(tokens.float(), pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
        return video


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to the values of a patch. Every token uses the first vector."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        t, h, w = config.patch_size
        self.linear = nn.Linear(config.hidden_size, config.out_channels * t * h * w)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vectors).chunk(2, dim=-1)
        return self.linear(layer_norm_modulate(x, shift, scale))  # type: ignore[no-any-return]
