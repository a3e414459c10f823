"""Passes of few shapes, so that they can be compiled, captured as a CUDA graph, or be the same for every caller."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .model import KVCache, Transformer, of_one_text

EXACT_ROWS = 16  # an exact model computes every short pass as this many rows, so k is at most 15
SHORT = EXACT_ROWS + 1  # passes over more tokens are prefill, and run as they are


class FixedShapes:
    """A model whose short passes come in few shapes. A pass over T tokens runs as the smallest of ``sizes`` rows that
    holds them, its last token repeated: that writes the same row of the cache again and changes nothing."""

    def __init__(self, model: Transformer, forward_at: Callable, sizes: tuple[int, ...]):
        self.model, self.forward_at, self.sizes = model, forward_at, sizes
        self.config, self.device, self.dtype, self.offered = model.config, model.device, model.dtype, model.offered
        self.positions = torch.arange(model.config.context, device=model.device)

    def new_cache(self) -> KVCache:
        return self.model.new_cache()

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, T, V), as of the model itself."""
        T = of_one_text(ids).shape[1]
        size = next((n for n in self.sizes if n >= T), None)
        if size is None:
            if cache.length and self.sizes == (EXACT_ROWS,):
                raise ValueError(f"an exact pass reads at most {EXACT_ROWS} tokens; choose k ≤ {EXACT_ROWS - 1}.")
            return self.model(ids, cache)
        start = cache.append(T)
        positions = self.positions[start : cache.length]
        if size > T:
            rows = self.positions[:size].clamp(max=T - 1)
            ids, positions = ids[:, rows], positions[rows]
        return self.read(ids, positions, cache)[:, :T]

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return self.forward_at(ids, positions, cache.k, cache.v)


class CapturedShapes(FixedShapes):
    """Fixed shapes as CUDA graphs, captured when first needed. A graph knows its cache by address: there is one cache,
    and one text at a time."""

    def __init__(self, model: Transformer, forward_at: Callable, sizes: tuple[int, ...]):
        super().__init__(model, forward_at, sizes)
        self.cache, self.graphs = model.new_cache(), {}

    def new_cache(self) -> KVCache:
        self.cache = copy.copy(self.cache)  # the same rows under a new length: who holds the old one is told so
        self.cache.clear()
        return self.cache

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        if cache is not self.cache:
            raise ValueError("another text was begun on this model; captured passes decode one text at a time.")
        rows = ids.shape[1]
        if rows not in self.graphs:
            function = partial(self.forward_at, keys=cache.k, values=cache.v)
            self.graphs[rows] = Captured(function, ids, positions)
        return self.graphs[rows](ids, positions)


class Captured:
    """A function of tensors whose shapes never change, replayed as one CUDA graph; on a CPU simply called.

    It is captured on ``inputs`` and run a few times for that, so calling it twice must do no harm. What it returns
    is overwritten by the next call.
    """

    def __init__(self, function: Callable, *inputs: Tensor):
        self.function, self.inputs, self.graph = function, [x.clone() for x in inputs], None
        if inputs[0].device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate their workspaces before anything is captured
                for _ in range(3):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return self.outputs
