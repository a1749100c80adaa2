"""What encoding and decoding take, for planning. Temporary: by the sizes of the largest tensors."""

from __future__ import annotations

from lowvram_i2v.vae.config import VaeConfig


def encode_bytes(config: VaeConfig, width: int, height: int) -> int:
    return 7 * config.block_out_channels[0] * width * height * 2


def decode_bytes(config: VaeConfig, latent: tuple[int, int, int], policy: str) -> tuple[int, int]:
    frames, rows, columns = latent
    if policy == "tiled":
        frames, rows, columns = min(frames, 17), min(rows, 32), min(columns, 32)
    return 13 * config.block_out_channels[0] * frames * 4 * rows * columns * 64 * 2, 0
