"""Block streaming: slabs (a block's bytes), the pinned arena, the copy queue, and the stream of blocks."""
