"""Tiny models and texts for the tests: real classes, small numbers."""

import numpy as np
import pytest
import torch

from specdec.data import TokenData, load_tokenizer
from specdec.model import ModelConfig, Transformer

torch.set_num_threads(1)  # the models here are too small for two


def make_model(n_layers=2, width=16, seed=0, *, vocab_size=8, n_ids=5, context=16, n_heads=2, n_kv_heads=1, scale=6.0):
    """A random float64 Transformer whose distributions are far from uniform."""
    config = ModelConfig(
        n_layers, n_heads, width, n_kv_heads, vocab_size=vocab_size, n_ids=n_ids, context=context, dropout=0.0
    )
    model = Transformer(config, torch.Generator().manual_seed(seed)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)
    return model


@pytest.fixture
def pair():
    """A target and a cheaper draft that disagrees with it."""
    return make_model(2, 16, 1), make_model(1, 8, 2)


@pytest.fixture
def toy_data():
    """4,000 tokens of a repetitive text over 64 ids, and 1,000 held-out ones."""
    generator = np.random.default_rng(0)
    tokens = (np.arange(5000) * 7 + generator.integers(0, 3, 5000)).astype(np.uint16) % 64
    return TokenData(tokens[:4000], tokens[4000:], load_tokenizer(0), {"sha256": "toy"})
