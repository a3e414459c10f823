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
            raise ValueError(f"top_k is {self.top_k}; give at least 1, or leave it out to keep every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number in (0, 1], or leave it out to keep every token.")

    @property
    def filters(self) -> bool:
        """Whether there is more to do than to divide by the temperature."""
        return self.top_k is not None or self.top_p is not None

    def probs(self, logits: Tensor, model: str = "model") -> Tensor:
        """Logits (…, V) → probabilities (…, V), in float32, or float64 if the logits are.

        ``model`` names the culprit when a logit is infinite or not a number: a ValueError on the CPU. To look would
        make an accelerator wait, so there the whole row becomes NaN, and the engine finds out with the next token.
        """
        if logits.device.type != "cpu":
            return self.probs_or_nan(logits)
        logits = _wide(logits)
        if not math.isfinite(logits.sum()):
            raise ValueError(not_finite(model))
        return self.of_finite(logits)

    def probs_or_nan(self, logits: Tensor) -> Tensor:
        """`probs` without a look at the values."""
        logits = _wide(logits)
        return torch.where(logits.sum(-1, keepdim=True).isfinite(), self.of_finite(logits), torch.nan)

    def draw(self, logits: Tensor, randomness: "Randomness", model: str = "model") -> tuple[Tensor, Tensor]:
        """One id (1,) from logits (V,), and the distribution (V,) that it was drawn from."""
        probs = self.probs(logits, model)
        return randomness.choose(probs), probs

    def of_finite(self, logits: Tensor) -> Tensor:
        """`probs` of logits in float32 or float64 that are known to be finite."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        if self.temperature != 1:  # shifted first, so that a tiny temperature neither overflows nor blurs
            least = torch.finfo(logits.dtype).tiny  # below it the division would be by zero
            logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, least)
        probs = logits.softmax(-1)
        if self.top_k is not None and self.top_k < probs.shape[-1]:
            kept = probs.topk(self.top_k, -1).indices  # by index, so that ties never keep more than top_k
            probs = torch.zeros_like(probs).scatter_(-1, kept, probs.gather(-1, kept))
            probs = probs / probs.sum(-1, keepdim=True)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked  # mass of the more probable tokens
            kept = before < max(self.top_p, torch.finfo(probs.dtype).tiny)  # the first one always
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked * kept)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def not_finite(model: str) -> str:
    return f"the {model} produced a logit that is not finite; check its weights and its data type."


class Randomness:
    """Every random decision of a generation, drawn from one generator on the models' device; None: a fresh seed.

    The two verbs are all the engine knows of chance. A test's oracle offers the same two and enumerates instead.
    """

    def __init__(self, seed: int | None = None, device: str | torch.device = "cpu"):
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"the seed is {seed}; give a number of 64 bits.")
        self.generator = torch.Generator(device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.many, self.ahead, self.used = 1024, None, 0  # drawn ahead: a call for many takes hardly longer than for one

    def uniforms(self, n: int) -> Tensor:
        """(n,) float64 in [0, 1), multiples of 2⁻⁵³."""
        first = self._take(n)
        return self.ahead[first : first + n]

    def address(self, n: int) -> int:
        """Where the next n numbers lie in memory, until others are taken; quicker than a tensor of them."""
        first = self._take(n)
        return self.ahead.data_ptr() + first * self.ahead.itemsize

    def _take(self, n: int) -> int:
        """Where the next n numbers begin among those drawn ahead."""
        if self.ahead is None or self.used + n > len(self.ahead):
            many, device = max(n, self.many), self.generator.device
            self.ahead, self.used = torch.rand(many, dtype=torch.float64, generator=self.generator, device=device), 0
        self.used += n
        return self.used - n

    def choose(self, probs: Tensor) -> Tensor:
        """One index (1,) drawn from probs (V,), by inversion in float64.

        ``right=True`` and u < 1 together mean that an index of probability zero is never chosen. Out of a row of NaN
        comes V, which is no index.
        """
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (V,)
        return torch.searchsorted(cdf, self.uniforms(1) * cdf[-1], right=True)  # (1,)

    def flips(self, probs: Tensor) -> Tensor:
        """Independent coins: True with probability probs (k,) → (k,) bool. One uniform each, never reused."""
        return self.uniforms(probs.shape[-1]) < probs


class Numbers(Randomness):
    """Uniform numbers that were drawn before, handed out in order: chance for a captured graph, which cannot draw."""

    def __init__(self, numbers: Tensor):
        self.ahead, self.used = numbers, 0


def as_written(randomness: object) -> bool:
    """Whether it chooses and flips as `Randomness` does, so that a compiled pass may take its numbers and do so instead."""
    return type(randomness) in (Randomness, Numbers)


def spread(rows: Tensor, offered: Tensor | None, n_ids: int) -> Tensor:
    """Rows (k, N) over the ids ``offered`` (N,), or over all if that is None → over all ids (k, V)."""
    return rows if offered is None else rows.new_zeros(len(rows), n_ids).index_copy_(1, offered, rows)


class Rule(Protocol):
    """A verification rule: how many drafted tokens stay, and which token follows them.

    drafted (k,) ids · draft_probs (k, V), the rows they were drawn from · target_probs (k+1, V) → (accepted, next),
    ``accepted`` an integer () in 0 … k, ``next`` an id (1,). Lossless when the emitted tokens follow the target's law.
    Both stay on an accelerator: no rule waits for a value, so that one synchronisation a round is enough.
    """

    def __call__(
        self, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
    ) -> tuple[int | Tensor, Tensor]: ...


def residual(target_probs: Tensor, draft_probs: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """norm(max(scale·p − q, 0)) (…, V): what q failed to cover. Where nothing is left (p = q), p itself."""
    rest = (scale * target_probs - draft_probs).clamp_(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total == 0, target_probs, rest / total)  # a NaN stays one


def token_wise(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    """Keep xᵢ while uᵢ < p(xᵢ)/q(xᵢ); at the first refusal draw from norm(max(p − q, 0)), else the bonus from p."""
    p, q = _of_drafted(drafted, draft_probs, target_probs)
    kept = randomness.flips((p / q).clamp(max=1))  # (k,)
    accepted = kept.long().cumprod(0).sum()  # ()
    return accepted, randomness.choose(_following(accepted, draft_probs, target_probs))


def block(drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness) -> tuple[Tensor, Tensor]:
    """Judge the block as a whole: never keeps fewer tokens than `token_wise` on average, the same law.

    Pᵢ = min(1, Pᵢ₋₁·p(xᵢ)/q(xᵢ)); the *largest* i that passes its coin hᵢ stays, and the residual uses P_τ·p − q.
    """
    k = drafted.shape[0]
    p, q = _of_drafted(drafted, draft_probs, target_probs)
    weights = [p.new_ones(())]
    for ratio in p / q:
        weights.append((weights[-1] * ratio).clamp(max=1))
    weights = torch.stack(weights)  # (k+1,) P₀ … P_k
    uncovered = (weights[1:k, None] * target_probs[1:k] - draft_probs[1:]).clamp_(min=0).sum(-1)  # (k−1,)
    refused = uncovered + (1 - weights[1:k])  # in this order, or a coin that cannot fall badly would by rounding
    coins = torch.where(refused > 0, uncovered / refused, 1.0)  # (k−1,) h₁ … h_{k−1}; the last one is P_k
    passed = randomness.flips(torch.cat([coins, weights[k:]])[:k])  # (k,)
    accepted = torch.cat([passed.new_zeros(1), passed]).long().mul(torch.arange(k + 1, device=passed.device)).amax()
    return accepted, randomness.choose(_following(accepted, draft_probs, target_probs, weights))


def _of_drafted(drafted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> tuple[Tensor, Tensor]:
    """p(xᵢ) and q(xᵢ), each (k,); q is positive, because the tokens were drawn from it."""
    ids = drafted[:, None]
    return target_probs[: ids.shape[0]].gather(-1, ids)[:, 0], draft_probs.gather(-1, ids)[:, 0]


def _following(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """The distribution (V,) of the token after the accepted ones: the residual, or p itself if none was refused.

    ``accepted`` indexes rows as a tensor: Python's own branch would wait for its value.
    """
    row, k = accepted[None], draft_probs.shape[0]
    p = target_probs.index_select(0, row)[0]
    if k == 0:
        return p
    q = draft_probs.index_select(0, row.clamp(max=k - 1))[0]
    scale = 1.0 if weights is None else weights.index_select(0, row)
    return torch.where(row < k, residual(p, q, scale), p)


RULES: dict[str, Rule] = {"token-wise": token_wise, "block": block}


class _Coins:
    """In place of `Randomness`: remembers the coins that a rule wants to toss, and refuses every draft."""

    def flips(self, probs: Tensor) -> Tensor:
        self.probs = probs
        return torch.zeros_like(probs, dtype=torch.bool)

    def choose(self, probs: Tensor) -> Tensor:
        return probs.argmax(-1, keepdim=True)


def expected_accepted(rule: Rule, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> float:
    """E[accepted | drafted]: the rule's own coins weighed instead of tossed, so that two rules can be compared without
    the noise of their coins. Knows how `token_wise` and `block` read their coins; ValueError for another."""
    if rule not in (token_wise, block):
        name = getattr(rule, "__name__", rule)
        raise ValueError(f"how {name} reads its coins is not known; compare samples, or teach this function.")
    if not len(drafted):
        return 0.0
    coins = _Coins()
    rule(drafted, draft_probs, target_probs, coins)
    if rule is token_wise:  # the i-th stays if coins 1 … i all pass
        return float(coins.probs.cumprod(0).sum())
    return float((1 - (1 - coins.probs).flip(0).cumprod(0)).sum())  # … if any of the coins i … k passes
