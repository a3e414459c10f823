"""Exact laws: a decision oracle in place of random numbers, and a walk over every branch of an experiment."""

import itertools

import torch


class _Branch(Exception):
    pass


class Oracle:
    """The two verbs of `specdec.sampling.Randomness`, following a script of choices and multiplying up their weights.

    ``kind`` merges coins that no rule can tell apart: after the first refusal ("first") or before the last acceptance
    ("last"). ``None`` walks all 2^k of them, which the merged walks are checked against.
    """

    def __init__(self, script, kind):
        self.script, self.kind, self.weight, self.width = list(script), kind, 1.0, 0

    def _decide(self, options):
        options = [(value, weight) for value, weight in options if weight > 0]
        if len(options) > 1 or not options:
            if not self.script:
                self.width = len(options)
                raise _Branch
            value, weight = options[self.script.pop(0)]
        else:
            value, weight = options[0]
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
        script = scripts.pop()
        oracle = Oracle(script, kind)
        try:
            outcome = experiment(oracle)
        except _Branch:
            scripts += [script + (i,) for i in range(oracle.width)]
        else:
            law[outcome] = law.get(outcome, 0.0) + oracle.weight
    return law


def total_variation(a, b):
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b})
