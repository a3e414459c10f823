"""specdec: lossless speculative decoding, as a research report you can run."""

import os

# Weights in large pages, where the system offers them, are read faster; torch looks when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def load(name_or_folder, device="cpu", dtype=None):
    """A model in eval mode from a checkpoint, a Hugging Face folder or "org/name" on its hub; see `specdec.export.load`."""
    from .export import load  # not above, so that importing specdec does not import torch

    return load(name_or_folder, device, dtype)
