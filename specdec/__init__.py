"""specdec: lossless speculative decoding, as a research report you can run."""


def load(name_or_folder, device="cpu", dtype=None):
    """A model in eval mode from a checkpoint, a Hugging Face folder or "org/name" on its hub; see `specdec.export.load`."""
    from .export import load  # not above, so that importing specdec does not import torch

    return load(name_or_folder, device, dtype)
