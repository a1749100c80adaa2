"""From prompt and picture to what the transformer reads: `PromptEmbeds`.

template (the words around the prompt) -> tokenizers (ids, which rows are kept, what was cut off) -> llava and
clip (the two networks, built through transformers without the layers nobody reads) -> encode (rows and pooled
vector).

Invariant: only real tokens exist. Nothing is padded, so there is no mask anywhere.
"""
