"""From logits to tokens: probabilities, draws, and the verification rules that make speculation lossless.

Pure functions on tensors whose last axis is the vocabulary (…, V). Temperature 0 is the one-hot distribution, not a
special case, so every rule below covers greedy decoding too. Token-wise rule: Leviathan et al. 2023 (2211.17192),
algorithm 1, and Chen et al. 2023 (2302.01318). Block rule: Sun et al. 2024 (2403.10444), algorithm 2.
All randomness comes through a `Randomness`, so that a test can replace it and walk every branch.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that is sampled from. Filters apply in the order written here."""

    temperature: float = 1.0  # 0 is greedy: all mass on the argmax
    top_k: int | None = None  # keep the k most probable tokens; None keeps all
    top_p: float | None = None  # keep the smallest set of tokens whose mass reaches p; None keeps all

    def __post_init__(self):
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give a finite number of at least 0 (0 is greedy).")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1, or None to keep every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number in (0, 1], or None to keep every token.")

    def probs(self, logits: Tensor, model: str = "model") -> Tensor:
        """Logits (…, V) → probabilities (…, V), in float32, or float64 if the logits are.

        ``model`` names the culprit when a logit is infinite or not a number (ValueError).
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not math.isfinite(logits.sum()):
            raise ValueError(f"the {model} produced a logit that is not finite; check its weights and its data type.")
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        if self.temperature != 1:  # shifted first, so that a tiny temperature neither overflows nor blurs
            logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probs = logits.softmax(-1)
        if self.top_k is not None and self.top_k < probs.shape[-1]:
            kept = probs.topk(self.top_k, -1).indices  # by index, so that ties never keep more than top_k
            probs = torch.zeros_like(probs).scatter_(-1, kept, probs.gather(-1, kept))
            probs = probs / probs.sum(-1, keepdim=True)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked  # mass of the more probable tokens
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked * (before < self.top_p))
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


class Randomness:
    """Every random decision of a generation, drawn from one generator on the models' device; None: a fresh seed.

    The two verbs are all the engine knows of chance. A test's oracle offers the same two and enumerates instead.
    """

    def __init__(self, seed: int | None = None, device: str | torch.device = "cpu"):
        self.generator = torch.Generator(device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def uniforms(self, n: int) -> Tensor:
        """(n,) float64 in [0, 1), multiples of 2⁻⁵³."""
        return torch.rand(n, dtype=torch.float64, generator=self.generator, device=self.generator.device)

    def choose(self, probs: Tensor) -> Tensor:
        """One index (1,) drawn from probs (V,), by inversion in float64.

        ``right=True`` and u < 1 together mean that an index of probability zero is never chosen.
        """
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (V,)
        return torch.searchsorted(cdf, self.uniforms(1) * cdf[-1], right=True)  # (1,)

    def flips(self, probs: Tensor) -> Tensor:
        """Independent coins: True with probability probs (k,) → (k,) bool. One uniform each, never reused."""
        return self.uniforms(probs.shape[-1]) < probs


class Rule(Protocol):
    """A verification rule: how many drafted tokens stay, and which token follows them.

    drafted (k,) ids · draft_probs (k, V), the rows they were drawn from · target_probs (k+1, V) → (accepted, next),
    ``accepted`` an int in 0 … k, ``next`` an id (1,). Lossless when the emitted tokens follow the target's law.
    """

    def __call__(
        self, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
    ) -> tuple[int, Tensor]: ...


def residual(target_probs: Tensor, draft_probs: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """norm(max(scale·p − q, 0)) (…, V): what q failed to cover. Where nothing is left (p = q), p itself."""
    rest = (scale * target_probs - draft_probs).clamp_(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, target_probs)


def token_wise(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
) -> tuple[int, Tensor]:
    """Keep xᵢ while uᵢ < p(xᵢ)/q(xᵢ); at the first refusal draw from norm(max(p − q, 0)), else the bonus from p."""
    k = drafted.shape[0]
    if k == 0:
        return 0, randomness.choose(target_probs[0])
    p = target_probs[:k].gather(-1, drafted[:, None])[:, 0]  # (k,)
    q = draft_probs.gather(-1, drafted[:, None])[:, 0]  # (k,), positive: the tokens were drawn from it
    kept = randomness.flips((p / q).clamp(max=1))  # (k,)
    accepted = int(kept.long().cumprod(0).sum())
    if accepted == k:
        return k, randomness.choose(target_probs[k])
    return accepted, randomness.choose(residual(target_probs[accepted], draft_probs[accepted]))


def block(drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness) -> tuple[int, Tensor]:
    """Judge the block as a whole: never keeps fewer tokens than `token_wise` on average, the same law.

    Pᵢ = min(1, Pᵢ₋₁·p(xᵢ)/q(xᵢ)); the *largest* i that passes its coin hᵢ stays, and the residual uses P_τ·p − q.
    """
    k = drafted.shape[0]
    if k == 0:
        return 0, randomness.choose(target_probs[0])
    p = target_probs[:k].gather(-1, drafted[:, None])[:, 0]
    q = draft_probs.gather(-1, drafted[:, None])[:, 0]
    weights, weight = [], target_probs.new_ones(())
    for ratio in p / q:
        weight = (weight * ratio).clamp(max=1)
        weights.append(weight)
    weights = torch.stack(weights)  # (k,) P₁ … P_k
    uncovered = (weights[:-1, None] * target_probs[1:k] - draft_probs[1:]).clamp_(min=0).sum(-1)  # (k−1,)
    refused = uncovered + 1 - weights[:-1]
    coins = torch.where(refused > 0, uncovered / refused, 1.0)  # (k−1,)
    passed = randomness.flips(torch.cat([coins, weights[-1:]]))  # (k,)
    accepted = int((passed.long() * torch.arange(1, k + 1, device=passed.device)).amax())
    if accepted == k:
        return k, randomness.choose(target_probs[k])
    scale = weights[accepted - 1] if accepted else 1.0
    return accepted, randomness.choose(residual(target_probs[accepted], draft_probs[accepted], scale))


RULES: dict[str, Rule] = {"token-wise": token_wise, "block": block}
