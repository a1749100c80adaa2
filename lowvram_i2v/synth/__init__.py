"""Checkpoints of random weights in the released layout, of any size: for tests, demos and measurements.

sizes (configurations) -> weights (seeded, they keep activations sane) and tokenizers -> released (the files).
Importing it imports torch.
"""

from lowvram_i2v.synth.released import synth as synth
