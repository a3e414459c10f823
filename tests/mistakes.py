"""Speculative sampling done wrong: mistakes seen in other people's code, and others that are easy to make.

Each is a rule, a drafter or a cache that the real engine runs in place of the right one, to be rejected by the proof.
Where one was seen stands beside it; without such a note it is only easy to make.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch

from specdec.drafting import Draft, DraftModel
from specdec.model import KVCache
from specdec.sampling import Rule, Sampling, block, residual, token_wise

# Rules


def always_accept(drafted, q, p, randomness):
    return len(drafted), randomness.choose(p[-1])


def residual_forgotten(drafted, q, p, randomness):
    """After a refusal the next token is drawn from p itself."""
    n, following = token_wise(drafted, q, p, randomness)
    return n, following if n == len(drafted) else randomness.choose(p[n])


def swapped(drafted, q, p, randomness):
    return token_wise(drafted, p[: len(drafted)], torch.cat([q, p[len(drafted) :]]), randomness)


def another_q(drafted, q, p, randomness):
    """The ratio is taken with a flatter q than the one that was drawn from."""
    return token_wise(drafted, (q + 0.3) / (q + 0.3).sum(-1, keepdim=True), p, randomness)


def one_row_late(drafted, q, p, randomness):
    """Each draft is judged by the row of p that follows it."""
    return token_wise(drafted, q, torch.cat([p[1:], p[-1:]]), randomness)


def one_uniform(drafted, q, p, randomness):
    """The same uniform for every position: x₁ … xᵢ stay while it is below the smallest ratio so far."""
    lowest = [float((p[i, x] / q[i, x]).clamp(max=1)) for i, x in enumerate(drafted)]
    before, accepted = 1.0, 0
    for i in range(len(drafted)):
        low = min(lowest[: i + 1])
        if not bool(randomness.flips(torch.tensor([low / before], dtype=torch.float64))[0]):
            return accepted, randomness.choose(residual(p[i], q[i]))
        before, accepted = low, accepted + 1
    return accepted, randomness.choose(p[accepted])


def block_until_first_refusal(drafted, q, p, randomness):
    """Block verification that stops at the first coin that fails instead of taking the last that passes."""

    class FirstFailure:
        choose = staticmethod(randomness.choose)
        flips = staticmethod(lambda probs: randomness.flips(probs).long().cumprod(0).bool())

    return block(drafted, q, p, FirstFailure)


def block_plain_residual(drafted, q, p, randomness):
    """Block verification with the residual of the token-wise rule, without the weight P."""
    n, following = block(drafted, q, p, randomness)
    return n, following if n == len(drafted) else randomness.choose(residual(p[n], q[n]))


def bonus_by_argmax(drafted, q, p, randomness):
    """Where all drafts stay, the token after them is the most probable one instead of a drawn one."""
    n, following = token_wise(drafted, q, p, randomness)
    return n, p[-1].argmax(-1, keepdim=True) if n == len(drafted) else following


# Drafters


class Argmax:
    """A source of randomness that is none: the most probable token, whatever the coins say."""

    def __init__(self, randomness):
        self.flips = randomness.flips

    def choose(self, probs):
        return probs.argmax(-1, keepdim=True)


class ArgmaxDrafts(DraftModel):
    """Drafts greedily, and hands over the soft q."""

    def propose(self, text, k, sampling, randomness):
        return super().propose(text, k, sampling, Argmax(randomness))


class DropsUnlikely(DraftModel):
    """Stops drafting when the token it has just drawn looks unlikely, and drops that token."""

    def propose(self, text, k, sampling, randomness):
        draft = super().propose(text, k, sampling, randomness)
        for i, x in enumerate(draft.tokens):
            if draft.probs[i, x] < 0.4:
                return Draft(draft.tokens[:i], draft.probs[:i])
        return draft


class Unfiltered(DraftModel):
    """Draws after the filter and reports q before it."""

    def propose(self, text, k, sampling, randomness):
        draft, rows = super().propose(text, k, sampling, randomness), []
        for i in range(len(draft.tokens)):
            logits = self.model(torch.tensor([text + draft.tokens[:i].tolist()]))[0, -1, : self.n_ids]
            rows.append(Sampling(sampling.temperature).probs(logits))
        return Draft(draft.tokens, torch.stack(rows)) if rows else draft


class DrawsInBfloat16(DraftModel):
    """Draws from probabilities rounded to bfloat16 and reports the exact ones."""

    def propose(self, text, k, sampling, randomness):
        class Rounded:
            choose = staticmethod(lambda probs: randomness.choose(probs.bfloat16()))

        return super().propose(text, k, sampling, Rounded)


class Hole(DraftModel):
    """Claims to have read its own last draft after a fully accepted round. Seen in an earlier attempt at this design."""

    def propose(self, text, k, sampling, randomness):
        if 0 < self.cache.length < len(text) - 1:
            self.cache.k[..., self.cache.length, :] = 0
            self.cache.v[..., self.cache.length, :] = 0
            self.cache.append(1)
        return super().propose(text, k, sampling, randomness)


# Temperature 0


@dataclass(frozen=True)
class SoftZero(Sampling):
    """Greedy decoding that drafts the argmax and then takes the ratio of the softmaxes."""

    def probs(self, logits, model="model"):
        return Sampling(1.0).probs(logits, model)


def greedy_by_ratio(drafted, q, p, randomness):
    return token_wise(drafted, q, p, Argmax(randomness))


# Caches


class KeepsRefusedRow(KVCache):
    """Truncated, but the first row that was refused stays, in the place of the last one that is true."""

    def truncate(self, length):
        if 0 < length < self.length:
            self.k[..., length - 1, :] = self.k[..., length, :]
            self.v[..., length - 1, :] = self.v[..., length, :]
        super().truncate(length)


class NeverTruncated(KVCache):
    """What was refused stays in the text, and what follows is read behind it."""

    def truncate(self, length):
        pass


def with_cache(target, kind):
    """A copy of a target whose caches are of that ``kind``."""
    target = copy.deepcopy(target)
    target.new_cache = lambda *_, **__: kind(target.config, dtype=target.dtype)
    return target


class DraftKeepsRefusedRow(DraftModel):
    def __init__(self, model):
        super().__init__(model)
        self.cache = KeepsRefusedRow(model.config, dtype=model.dtype)


class DraftNeverTruncated(DraftModel):
    """Counts by itself what it has read of the text, since the length of its cache no longer says so."""

    def start(self):
        super().start()
        self.refused = 0  # rows that ought to be gone

    def propose(self, text, k, sampling, randomness):
        return super().propose([0] * self.refused + text, k, sampling, randomness)  # what is in the cache is not read

    def truncate(self, length):
        self.refused += max(0, self.cache.length - self.refused - length)


class Mistake(NamedTuple):
    rule: Rule = token_wise
    drafter: type = DraftModel
    sampling: Sampling = Sampling()


# Those that change the law of the text; the caches of a draft do not, and have a detector of their own. A name has no
# parenthesis: in the record one follows that says where else the mistake was tried.
MISTAKES = {
    "always accept": Mistake(always_accept),  # transformers, pull request 28508
    "drafts by argmax, ratio with the soft q": Mistake(drafter=ArgmaxDrafts),  # transformers, issue 32867
    "a drawn token dropped because q is small": Mistake(drafter=DropsUnlikely),  # implementations of an "adaptive k"
    "q before the top-k filter": Mistake(drafter=Unfiltered, sampling=Sampling(top_k=2)),  # transformers, issue 47932
    "drawn in bfloat16, ratio in full precision": Mistake(drafter=DrawsInBfloat16),  # DeepSpec, issue 31
    "block: stop at the first refusal": Mistake(block_until_first_refusal),  # vllm-ascend, issue 7807
    "block: residual without its weight": Mistake(block_plain_residual),  # the same
    "temperature 0 by the ratio of softmaxes": Mistake(greedy_by_ratio, ArgmaxDrafts, SoftZero(0)),
    "the same uniform for every position": Mistake(one_uniform),
    "p and q swapped": Mistake(swapped),
    "the residual forgotten": Mistake(residual_forgotten),
    "ratio with another q": Mistake(another_q),
    "rows of p one position late": Mistake(one_row_late),
    "the bonus by argmax": Mistake(bonus_by_argmax),
}
