"""Triton's interpreter for this folder's tests, where there is no GPU to run them.

`triton.jit` decides when a kernel's file is imported, so this must come before the first such import.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
