"""The four errors a user can act on. Everything else is a bug and shows its trace.

Invariant: every message says *what* is wrong with its numbers, then the remedy. The command line catches
`LowVramError` in one place and prints it without a trace; nothing else catches it.
"""


class LowVramError(Exception):
    """Base of the four. `str()` is "what" and, on a line of its own, the remedy."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}\n  {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class RequestError(LowVramError):
    """What the user asked for cannot be: a flag, a size, a prompt, an image, an output path."""


class CheckpointError(LowVramError):
    """Weights or a model folder that are missing, incomplete, damaged or not this model."""


class ResourceError(LowVramError):
    """Too little video memory, host memory or disk for the request."""


class PlatformError(LowVramError):
    """The machine lacks something: a CUDA device, a package, a working ffmpeg."""
