"""A model small enough to train for a few steps in a test, on clips that need no renderer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.synth.sizes import Size
from lowvram_i2v.vae.config import VaeConfig
from tools.train_demo import decoder, flow, text, vae
from tools.train_demo.clips import Clip, Clips
from tools.train_demo.loop import Run
from tools.train_demo.sizes import Recipe, Stage

COUNTS = (3, 2)
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 40, 220)}
WAYS = ("left", "right")
FRAMES = 5


def stage(steps: int, batch: int, learning_rate: float, muon: bool = True) -> Stage:
    return Stage(steps, batch, learning_rate, warmup=1, decay=0.9, chunk_steps=2, most_chunks=2, muon=muon)


MICRO = Recipe(
    Size(
        TransformerConfig(
            hidden_size=128,
            heads=1,
            double_blocks=1,
            single_blocks=1,
            refiner_blocks=1,
            mlp_ratio=1.0,
            text_dim=16,
            pooled_dim=16,
        ),
        VaeConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        llava_text={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "vocab_size": 8,
        },
        llava_vision={
            "hidden_size": 16,
            "image_size": 32,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "projection_dim": 16,
        },
        clip={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "projection_dim": 16,
            "vocab_size": 8,
        },
        llava_shards=1,
    ),
    clip_sizes=((32, 32), (48, 32)),
    clips_per_chunk=4,
    vae=stage(6, 1, 2e-3),
    text=stage(8, 4, 3e-3, muon=False),
    flow=stage(6, 4, 2e-3),
    decoder=stage(4, 1, 2e-3),
)


def square_clip(seed: int, number: int, size: tuple[int, int]) -> Clip:
    """A coloured square that moves left or right on grey."""
    random = np.random.default_rng([seed, number])
    colour, way = int(random.integers(len(COLOURS))), int(random.integers(len(WAYS)))
    width, height = size
    frames = np.full((FRAMES, height, width, 3), 128, np.uint8)
    for frame in range(FRAMES):
        left = width // 2 - 4 + (1 if way else -1) * frame
        frames[frame, 12:20, left : left + 8] = tuple(COLOURS.values())[colour]
    return Clip(frames, f"A {tuple(COLOURS)[colour]} square moves {WAYS[way]}.", (colour, way))


def prompts() -> list[str]:
    return [f"A {colour} square moves {way}." for colour in COLOURS for way in WAYS]


def clips() -> Clips:
    return Clips(square_clip, 0, MICRO.clip_sizes, MICRO.clips_per_chunk, 0, square_clip)


def run(work: Path, stop_at: int | None = None) -> Run:
    return Run(work, 0, 10.0, torch.device("cpu"), stop_at)


def train_all(work: Path) -> None:
    """All stages, to their ends."""
    with clips() as source:
        vae.train(MICRO, source, run(work))
        text.prepare(MICRO, prompts(), work)
        text.train(MICRO, COUNTS, source, run(work))
        flow.train(MICRO, source, run(work))
        decoder.train(MICRO, source, run(work))


def longer_flow(steps: int) -> Recipe:
    return replace(MICRO, flow=replace(MICRO.flow, steps=steps))
