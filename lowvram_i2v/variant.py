"""The two released variants of the model, told apart by data.

In the blocks both are "the first n image tokens use the second modulation vector", with n = 0 for latent_concat; the
sampler and the text encoder read the other differences from this table. No other file compares variant names.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """How one released variant conditions on the image.

    in_channels: channels of the transformer's input latent.
    replaces_first_frame: the image latent *is* the first latent frame, and its tokens are modulated as for t = 0;
        otherwise image latent and a mask are concatenated as channels (16 + 16 + 1).
    image_row_stride: every n-th of the 576 image rows of the text model is kept.
    dropped_frames: decoded frames thrown away at the start.
    """

    name: str
    in_channels: int
    replaces_first_frame: bool
    image_row_stride: int
    dropped_frames: int


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("token_replace", 16, replaces_first_frame=True, image_row_stride=4, dropped_frames=0),
        Variant("latent_concat", 33, replaces_first_frame=False, image_row_stride=2, dropped_frames=4),
    )
}
