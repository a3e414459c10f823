"""Closed forms of speculative decoding: what a speed-up can be before anything is run.

Letters as in Leviathan et al. 2023 (arXiv 2211.17192): ``p`` target, ``q`` draft, ``k`` drafted tokens per round,
``alpha`` the probability that a drafted token is accepted, ``c`` the cost of one draft step, ``v`` that of the
verifying pass and ``o`` all the rest of a round, each divided by the cost of one target step. Costs are measured
elsewhere; nothing here looks at a clock.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def overlap(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Probability that a token drawn from q is accepted: Σ min(p, q) = 1 − TV(p, q). Shapes (…, V), (…, V) → (…)."""
    return torch.minimum(target_probs, draft_probs).sum(-1)


def tokens_per_round(alpha: float | Sequence[float], k: int | None = None) -> float:
    """Expected tokens that one round emits, the target's own one included; between 1 and k + 1.

    ``alpha`` is one number, the i.i.d. model (1 − α^(k+1)) / (1 − α) of Leviathan et al., equation 1; or a sequence,
    the acceptance at each position given that all earlier ones were accepted, which gives 1 + Σᵢ Πⱼ≤ᵢ αⱼ.
    """
    if k is None and isinstance(alpha, (int, float)):
        raise ValueError("one acceptance rate says nothing of a round whose length is not known; give k.")
    alphas = [alpha] * k if isinstance(alpha, (int, float)) else list(alpha)[:k]
    if k is not None and len(alphas) < k:
        raise ValueError(f"{len(alphas)} acceptance rates cannot describe k = {k} positions; give one for each.")
    expected, reached = 1.0, 1.0
    for a in alphas:
        reached *= a
        expected += reached
    return expected


Cost = Callable[[int], float] | float


def round_cost(k: int, c: Cost, v: Cost = 1.0, o: float = 0.0) -> float:
    """Cost of one round in target steps: k·c + v(k+1) + o.

    ``c`` is a number, or a function that gives the cost of so many draft steps together; ``v`` is a number or a function
    of the rows verified.
    """
    return (c(k) if callable(c) else k * c) + (v(k + 1) if callable(v) else v) + o


def speedup(alpha: float | Sequence[float], k: int, c: Cost, v: Cost = 1.0, o: float = 0.0) -> float:
    """Tokens per second of speculation ÷ of the target alone: E / (k·c + v(k+1) + o)."""
    return tokens_per_round(alpha, k) / round_cost(k, c, v, o)


def text_cost(n: int, alphas: Sequence[float], k: int, c: Cost, v: Cost = 1.0, o: float = 0.0) -> float:
    """Expected cost in target steps of a text of n tokens, whose last rounds draft less: no more than is still wanted."""
    cost = [0.0]  # of the last m tokens
    for m in range(1, n + 1):
        drafted = min(k, m - 1)
        total, reached = round_cost(drafted, c, v, o), 1.0
        for accepted in range(drafted):
            total += reached * (1 - alphas[accepted]) * cost[m - 1 - accepted]
            reached *= alphas[accepted]
        cost.append(total + reached * cost[m - 1 - drafted])
    return cost[n]


def best_k(
    alpha: float | Sequence[float],
    c: Cost,
    v: Cost = 1.0,
    o: float = 0.0,
    k_max: int = 16,
) -> int:
    """The k in 1 … k_max with the largest predicted speed-up (the smallest such k if several tie)."""
    if not isinstance(alpha, (int, float)):
        k_max = min(k_max, len(alpha))
    return max(range(1, k_max + 1), key=lambda k: (speedup(alpha, k, c, v, o), -k))
