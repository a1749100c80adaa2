"""Turns downloaded weights into one model folder.

sources (one file a layout: files found, tensors named and read lazily) -> shapes (what the model must hold)
-> policy (what is stored how) -> writer (streaming, atomic) -> convert (the order of events).
"""
