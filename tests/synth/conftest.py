"""The tiny checkpoints that this folder's tests read; `tiny_models` makes them."""

from tiny_models import model, model_once, released, released_once

__all__ = ["model", "model_once", "released", "released_once"]
