"""The diffusion transformer: sizes, embedders, blocks, rotary tables, and the model that joins them."""
