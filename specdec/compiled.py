"""Short passes on the CPU, each one call of native.cpp: a verifying pass, a draft of several tokens, a decision.

Decoding is as fast as memory delivers the weights, and between two passes, which sweep the caches of the processor, each
small call of a library's costs several times what it does alone. So there should be few of them.
"""

import ctypes

import torch
from torch import Tensor

from .model import NO_TOKENS, KVCache, ModelConfig, Transformer, of_one_text
from .native import MOST, SUMS, TYPES, NativeModel, Whole, library, multiplied, sums
from .sampling import Randomness, Rule, Sampling, as_written, block, spread


class CompiledModel(Whole):
    """``model`` for decoding, called like the model itself. Any number of tokens is read as passes of at most 32 rows.

    The logits of a token are the same bits whatever tokens are read with it.
    """

    def __init__(self, model: Transformer):
        if model.dtype not in TYPES:
            raise ValueError(f"compiled passes do not know {model.dtype}; choose float32, float64 or bfloat16.")
        self.config, self.device, self.dtype, self.offered = model.config, model.device, model.dtype, model.offered
        self.native, self.sums = NativeModel(model), sums(model.dtype)
        self.n_choices = self.native.n_choices
        self.calls, self.type, self.at = library(), TYPES[model.dtype], ctypes.byref(self.native.struct)

    def new_cache(self) -> "PanelCache":
        return PanelCache(self.config, multiplied(self.dtype))

    def __call__(self, ids: Tensor, cache: "PanelCache") -> Tensor:
        """Logits (1, T, V) for ids (1, T), which continue the text in ``cache`` and are added to it."""
        logits = torch.empty(1, ids.shape[1], self.native.n_outputs, dtype=self.sums)
        self.read(ids, cache, logits[0])
        return logits[..., : self.native.n_offered]

    def read(self, ids: Tensor, cache: "PanelCache", logits: Tensor | None = None) -> None:
        """The same without the output layer, unless there is a place (T, V) for ``logits``."""
        T, ids = ids.shape[1], _long(ids)
        start = cache.append(T)
        for i in range(0, T, MOST):
            rows = min(MOST, T - i)
            place = (0, None) if logits is None else (rows, logits[i:].data_ptr())
            _check(self.calls.read(self.type, self.at, *cache.at, ids[:, i:].data_ptr(), rows, start + i, *place), cache, start)

    def probs(self, ids: Tensor, cache: "PanelCache", sampling: Sampling) -> Tensor:
        rows = ids.shape[1]
        if sampling.filters or not 0 < rows <= MOST:
            return super().probs(ids, cache, sampling)
        ids, start = _long(ids), cache.append(rows)
        probs = torch.empty(rows, self.native.n_outputs, dtype=self.sums)
        _check(self.calls.probabilities(
            self.type, self.at, *cache.at, ids.data_ptr(), rows, start, sampling.temperature, probs.data_ptr()
        ), cache, start)  # fmt: skip
        return self._unpadded(probs)

    def draw(
        self, ids: Tensor, cache: "PanelCache", sampling: Sampling, randomness: Randomness, n: int = 1
    ) -> tuple[Tensor, Tensor]:
        if sampling.filters:
            return super().draw(ids, cache, sampling, randomness, n)
        if ids.shape[1] > 2:  # a prompt
            self.read(ids[:, :-1], cache)
            ids = ids[:, -1:]
        ids = _long(ids)
        return self._draw(ids.data_ptr(), ids.shape[1], cache, sampling, randomness, n, as_ids=False)

    def propose(
        self, unread: list[int], cache: "PanelCache", sampling: Sampling, randomness: Randomness, n: int
    ) -> tuple[Tensor, Tensor]:
        if sampling.filters:
            return super().propose(unread, cache, sampling, randomness, n)
        if not unread:
            raise ValueError(NO_TOKENS)
        if len(unread) > 2:  # a prompt
            self.read(torch.tensor([unread[:-1]]), cache)
            unread = unread[-1:]
        ids = (ctypes.c_int64 * len(unread))(*unread)
        drawn, probs = self._draw(ids, len(unread), cache, sampling, randomness, n, as_ids=True)
        return drawn, spread(probs, self.offered, self.config.n_ids)

    def _draw(self, at, rows: int, cache: "PanelCache", sampling: Sampling, randomness: Randomness, n: int, as_ids: bool):
        start = cache.append(rows + n - 1)
        tokens, probs = torch.empty(n, dtype=torch.long), torch.empty(n, self.native.n_outputs, dtype=self.sums)
        _check(self.calls.draw(
            self.type, self.at, *cache.at, at, rows, start, n, sampling.temperature, randomness.address(n), as_ids,
            tokens.data_ptr(), probs.data_ptr(),
        ), cache, start)  # fmt: skip
        return tokens, self._unpadded(probs)

    def _unpadded(self, rows: Tensor) -> Tensor:
        return rows if rows.shape[1] == self.n_choices else rows[:, : self.n_choices]


class PanelCache(KVCache):
    """Keys and values as panels, so that attention is two products of few rows: keys (layers, K, S/L, D, L), values
    (layers, K, D/L, S, L), in which L is the lanes of a register; where numbers are multiplied in pairs, in that order."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self.capacity, self.length = config.context, 0
        layers, K, S, D = config.n_layers, config.n_kv_heads, config.context, config.head_size
        L = library().lanes
        self.k = torch.zeros(layers, K, -(-S // L), D, L, dtype=dtype)
        self.v = torch.zeros(layers, K, -(-D // L), S + S % 2, L, dtype=dtype)
        self.at = self.k.data_ptr(), self.v.data_ptr()


def compiled_rule(
    rule: Rule, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
) -> tuple[int | Tensor, Tensor]:
    """``rule``, `token_wise` or `block`, as one call: the same tokens for the same random numbers."""
    k, n_ids = draft_probs.shape
    if not k or draft_probs.dtype != target_probs.dtype or draft_probs.dtype not in SUMS or not as_written(randomness):
        return rule(drafted, draft_probs, target_probs, randomness)
    if drafted.shape != (k,) or target_probs.shape != (k + 1, n_ids):  # what is read beyond them is not ours
        raise ValueError(
            f"{tuple(drafted.shape)} drafts with rows {tuple(draft_probs.shape)} of q and {tuple(target_probs.shape)} of p "
            "cannot be judged; give k drafts, k rows and k + 1 rows over the same ids."
        )
    q, p = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (draft_probs, target_probs))
    drafted = drafted.contiguous()
    accepted, following = ctypes.c_int64(), drafted.new_empty(1)
    _check(library().decide(
        TYPES[p.dtype], rule is block, drafted.data_ptr(), q.data_ptr(), q.stride(0), p.data_ptr(), p.stride(0),
        randomness.address(k + 1), k, n_ids, ctypes.byref(accepted), following.data_ptr(),
    ))  # fmt: skip
    return accepted.value, following


def _long(ids: Tensor) -> Tensor:
    """ids (1, T) as they lie in memory."""
    of_one_text(ids)
    return ids if ids.dtype == torch.long and ids.is_contiguous() else ids.to(torch.long).contiguous()


def _check(known: bool, cache: KVCache | None = None, start: int = 0) -> None:
    if not known:
        if cache is not None:
            cache.truncate(start)  # nothing was read
        raise IndexError("there is an id that the model does not have; use the model's own tokenizer.")
