"""Exact laws: a decision oracle in place of random numbers, a walk over every branch, and the two laws to compare."""

import itertools

import torch

from specdec.engine import speculate
from specdec.sampling import Sampling, block, token_wise

MERGED = {token_wise: "first", block: "last"}  # coins that a rule cannot tell apart


class Oracle:
    """The two verbs of `specdec.sampling.Randomness`, following a script of choices and multiplying up their weights.

    Where the script ends it takes the first option of every decision and notes the others in ``untaken``. ``kind``
    merges coins that no rule can tell apart: after the first refusal ("first") or before the last acceptance ("last").
    ``None`` walks all 2^k of them, which the merged walks are checked against.
    """

    def __init__(self, script=(), kind=None):
        self.script, self.kind, self.weight = script, kind, 1.0
        self.taken, self.untaken = (), []

    def _decide(self, options):
        options = [(value, weight) for value, weight in options if weight > 0]
        i = 0
        if len(options) > 1:
            if len(self.taken) < len(self.script):
                i = self.script[len(self.taken)]
            else:
                self.untaken += [self.taken + (j,) for j in range(1, len(options))]
            self.taken += (i,)
        value, weight = options[i]
        self.weight *= weight
        return value

    def choose(self, probs):
        return torch.tensor([self._decide(list(enumerate((probs.double() / probs.double().sum()).tolist())))])

    def flips(self, probs):
        coins, options = probs.double().tolist(), []
        k = len(coins)
        if self.kind == "first":
            reached = 1.0
            for i, a in enumerate(coins):
                options.append(([True] * i + [False] * (k - i), reached * (1 - a)))
                reached *= a
            options.append(([True] * k, reached))
        elif self.kind == "last":
            left = 1.0
            for i in range(k - 1, -1, -1):
                options.append(([False] * i + [True] + [False] * (k - 1 - i), left * coins[i]))
                left *= 1 - coins[i]
            options.append(([False] * k, left))
        else:
            for outcome in itertools.product([True, False], repeat=k):
                weight = 1.0
                for value, a in zip(outcome, coins):
                    weight *= a if value else 1 - a
                options.append((list(outcome), weight))
        return torch.tensor(self._decide(options))


def walk(experiment, kind=None):
    """{outcome: exact probability} of ``experiment(oracle)``, which must return something hashable."""
    law, scripts = {}, [()]
    while scripts:
        oracle = Oracle(scripts.pop(), kind)
        outcome = experiment(oracle)
        law[outcome] = law.get(outcome, 0.0) + oracle.weight
        scripts += oracle.untaken
    return law


def total_variation(a, b):
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b})


@torch.inference_mode()
def own_law(target, prompt, sampling, n, *, stop=(), context=None):
    """The target's law of texts of up to n tokens, by its own conditional probabilities and without any cache."""
    law, context = {(): 1.0}, context or target.config.context
    for _ in range(n):
        longer = {}
        for text, weight in law.items():
            if text and text[-1] in stop or len(prompt) + len(text) == context:
                longer[text] = weight
                continue
            row = sampling.probs(target(torch.tensor([[*prompt, *text]]))[0, -1, : target.config.n_ids])
            longer |= {(*text, x): weight * p for x, p in enumerate(row.tolist()) if p}
        law = longer
    return law


def engine_law(target, drafter, prompt, sampling=Sampling(), k=2, n=3, *, rule=token_wise, stop=(), merged=True):
    """The law of what the real engine writes, through its real caches: every branch of every decision."""

    def experiment(oracle):
        options = dict(drafter=drafter, k=k, rule=rule, max_new_tokens=n, sampling=sampling, stop=stop)
        return tuple(speculate(target, prompt, randomness=oracle, **options))

    return walk(experiment, MERGED.get(rule) if merged else None)
