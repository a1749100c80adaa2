"""The fixtures of tiny model folders."""

from tiny_models import model, model_once, released_once

__all__ = ["model", "model_once", "released_once"]
