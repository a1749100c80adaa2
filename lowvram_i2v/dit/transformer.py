"""The HunyuanVideo-I2V diffusion transformer, in plain torch: read `condition`, then `predict`, from top to bottom.

Invariants: tensor names are those of the released checkpoint (856 for token_replace, 852 for latent_concat without a
guidance embedder); one sample, no padding, so no mask anywhere; nothing is changed in place, so that training can use
it, but where a caller lends a workspace (`dit/chunked.py`: the same blocks in little memory). The loop takes blocks as
they come: where their weights are is not known here. Left out: quantized weights.

Source: HunyuanVideo, arXiv 2412.03603; the arithmetic is pinned by the goldens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor, nn

from lowvram_i2v.attention import AttentionBackend
from lowvram_i2v.attention.sdpa import attend as sdpa
from lowvram_i2v.dit import chunked
from lowvram_i2v.dit.blocks import DoubleBlock, Rope, SingleBlock
from lowvram_i2v.dit.conditioning import StepConditioning, pack
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.embedders import PatchEmbedder, PooledEmbedder, ScalarEmbedder, TokenRefiner
from lowvram_i2v.dit.workspace import Workspace
from lowvram_i2v.kernels.modulate import layer_norm_modulate

BLOCK_LISTS = ("double_blocks", "single_blocks")


def is_in_block(name: str) -> bool:
    """Whether a weight of the transformer belongs to one of its blocks."""
    return name.split(".")[0] in BLOCK_LISTS


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

    def blocks(self) -> dict[str, nn.Module]:
        """Name -> block, in the order of a step."""
        return {f"{kind}.{n}": block for kind in BLOCK_LISTS for n, block in enumerate(getattr(self, kind))}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        guidance_scale: Tensor | None,
        rope: Rope,
    ) -> Tensor:
        """One step by itself: `condition`, then `predict`. timestep: [1], on the scale 0..1000."""
        (step,) = self.condition(timestep, prompt_embeds, pooled_prompt_embeds, guidance_scale)
        return self.predict(latents, step, rope)

    def condition(
        self,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        guidance_scale: Tensor | None,
        blocks: Iterable[nn.Module] | None = None,
    ) -> list[StepConditioning]:
        """All that time and prompt decide, for each of the timesteps [steps] on the scale 0..1000.

        prompt_embeds: [text tokens, text_dim]. pooled_prompt_embeds: [pooled_dim]. guidance_scale: [1] as the user
        means it (6.0), None if the weights have no guidance embedder. blocks: all blocks in order, each with its
        modulation layers in place from when it is yielded until the next one is asked for; None for the model's own.
        """
        dtype = self.vector_in.out_layer.weight.dtype
        prompt_embeds, pooled = prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype)[None]
        steps, vectors = len(timesteps), self.vectors(timesteps, pooled, guidance_scale)
        stream = iter(self.blocks().values() if blocks is None else blocks)
        modulation = torch.cat(list(self._modulation(vectors, steps, stream)), dim=1)
        return [
            StepConditioning(
                txt=self.txt_in(prompt_embeds, timesteps[i : i + 1], self.attend),
                modulation=modulation[i],
                vectors=2 if self.config.replaces_first_frame else 1,
                double_blocks=len(self.double_blocks),
                single_blocks=len(self.single_blocks),
            )
            for i in range(steps)
        ]

    def _modulation(self, vectors: Tensor, steps: int, blocks: Iterable[nn.Module]) -> Iterator[Tensor]:
        """The packed modulation of all steps in pieces [steps, rows, hidden], in the order of `StepConditioning`."""
        for block in blocks:
            if isinstance(block, DoubleBlock):
                yield pack(block.img_mod(vectors), steps)
                yield pack(block.txt_mod(vectors[:steps]), steps)
            else:
                assert isinstance(block, SingleBlock)
                yield pack(block.modulation(vectors), steps)
        yield pack(self.final_layer.modulation(vectors[:steps]), steps)

    def vectors(self, timesteps: Tensor, pooled: Tensor, guidance_scale: Tensor | None) -> Tensor:
        """What modulates the blocks: [steps, hidden] for all tokens. Where the image latent replaces the first frame,
        one more row serves that frame's tokens in every step: time 0, and no guidance."""
        prompt = self.vector_in(pooled)
        vectors = self.time_in(timesteps) + prompt
        if guidance_scale is not None:
            vectors = vectors + self.guidance_in(guidance_scale * 1000)
        if not self.config.replaces_first_frame:
            return vectors  # type: ignore[no-any-return]
        return torch.cat([vectors, self.time_in(torch.zeros_like(timesteps[:1])) + prompt])

    def predict(
        self,
        latents: Tensor,
        step: StepConditioning,
        rope: Rope,
        blocks: Iterable[nn.Module] | None = None,
        work: Workspace | None = None,
        attend: AttentionBackend | None = None,
    ) -> Tensor:
        """latents [in_channels, T, H, W] -> velocity [out_channels, T, H, W], float32.

        rope: `rope_table` of the token grid T x H/2 x W/2. blocks: all blocks in order, each with its weights in place
        from when it is yielded until the next one is asked for; None for the model's own. work: memory to compute in,
        by chunks of tokens and without autograd; None for the plain way. attend: this prediction's attention; None for
        the model's own.
        """
        attend = attend or self.attend
        stream = iter(self.blocks().values() if blocks is None else blocks)
        grid = [size // patch for size, patch in zip(latents.shape[1:], self.config.patch_size, strict=True)]
        first_tokens = grid[1] * grid[2] if step.vectors == 2 else 0
        if work is not None:
            return self.unpatchify(self._in_chunks(latents, step, rope, stream, first_tokens, work, attend), grid)

        img, txt = self.img_in(latents.to(self.img_in.proj.weight.dtype)), step.txt
        for block, modulations in zip(islice(stream, len(self.double_blocks)), step.double(), strict=True):
            img, txt = block(img, txt, modulations, first_tokens, rope, attend)
        x = torch.cat([img, txt])
        for block, modulation in zip(stream, step.single(), strict=True):
            x = block(x, modulation, first_tokens, rope, attend)
        return self.unpatchify(self.final_layer(x[: len(img)], step.final()), grid)

    @torch.no_grad()
    def _in_chunks(
        self,
        latents: Tensor,
        step: StepConditioning,
        rope: Rope,
        stream: Iterator[nn.Module],
        first_tokens: int,
        work: Workspace,
        attend: AttentionBackend,
    ) -> Tensor:
        """As `predict`, up to the values of patches [tokens, channels * patch]."""
        step = replace(step, modulation=step.modulation.float())
        run = chunked.begin(work, self.img_in, latents, step.txt, first_tokens, rope, attend)
        for block, modulations in zip(islice(stream, len(self.double_blocks)), step.double(), strict=True):
            assert isinstance(block, DoubleBlock)
            chunked.double_block(block, run, modulations)
        for block, modulation in zip(stream, step.single(), strict=True):
            assert isinstance(block, SingleBlock)
            chunked.single_block(block, run, modulation)
        return chunked.final_layer(self.final_layer.linear, run, step.final())

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

    def modulation(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """vectors [n, hidden] -> shift and scale, each [n, hidden]."""
        return self.adaLN_modulation(vectors).chunk(2, dim=-1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        shift, scale = modulation
        return self.linear(layer_norm_modulate(x, shift, scale))  # type: ignore[no-any-return]
