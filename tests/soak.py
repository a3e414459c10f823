"""The proof for as long as asked: random models, laws and settings until the time is up. `make soak`, SOAK_MINUTES=10.

Enumeration on random tiny models, and χ² on random laws of up to 50,304 ids, for both rules; now and then a deliberate
mistake, which has to be rejected. Prints its figures, and a failure with the seed that repeats it.
"""

import argparse
import random
import time

import mistakes
import torch
from chisquare import ALARM
from conftest import EXACT, make_model
from oracle import engine_law, own_law, total_variation
from test_statistics import emitted, examine

from specdec.drafting import DraftModel, PromptLookup
from specdec.sampling import RULES, Sampling

NOTICED = 1e-6  # total variation by which a mistake shows


def some_sampling(chance: random.Random, V: int) -> Sampling:
    return Sampling(
        chance.choice((0.3, 0.5, 1.0, 1.0, 1.7, 5.0)),
        chance.choice((None, None, chance.randint(1, V))),
        chance.choice((None, None, chance.uniform(0.1, 1.0))),
    )


def enumerate_one(chance: random.Random) -> tuple[str, float, int]:
    """(settings, total variation of the joint laws, texts) of a random pair of models."""
    n_ids = chance.choice((2, 3, 3, 4))
    n = chance.randint(1, {2: 5, 3: 3, 4: 3}[n_ids])
    shape = dict(vocab_size=n_ids + chance.randint(0, 2), n_ids=n_ids, context=chance.randint(3, 9))
    shape["scale"] = chance.choice((3, 6, 9))
    target = make_model(2, 16, chance.randrange(10**6), **shape)
    draft = make_model(1, 8, chance.randrange(10**6), **shape)
    drafter = chance.choice((DraftModel(draft), DraftModel(draft), DraftModel(target), PromptLookup(n_ids)))
    prompt = [chance.randrange(n_ids) for _ in range(chance.randint(1, 3))]
    sampling, rule, k = some_sampling(chance, n_ids), chance.choice(sorted(RULES)), chance.randint(1, 3)
    stop = chance.choice(((), (), (chance.randrange(n_ids),)))
    law = engine_law(target, drafter, prompt, sampling, k, n, rule=RULES[rule], stop=stop)
    exact = own_law(target, prompt, sampling, n, stop=stop)
    name = f"{type(drafter).__name__}, V = {n_ids}, {rule}, k = {k}, {n} tokens, {sampling}, stop {stop}, prompt {prompt}"
    return name, total_variation(law, exact), len(exact)


def some_laws(chance: random.Random, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(p (k+1, V), q (k, V), their description), from nearly equal to nearly disjoint."""
    V = int(round(2 ** chance.uniform(1, 15.62)))
    generator = torch.Generator().manual_seed(chance.randrange(10**9))
    sharp, noise, sampling = chance.uniform(0.5, 4), chance.choice((0.1, 0.5, 1, 3)), some_sampling(chance, V)
    logits = sharp * torch.randn(k + 1, V, generator=generator)
    guess = logits[:k] + noise * torch.randn(k, V, generator=generator)
    return sampling.probs(logits), sampling.probs(guess), f"V = {V}, noise {noise}, {sampling}"


def count_one(chance: random.Random, n: int) -> tuple[str, float, int]:
    """(settings, largest z ÷ its bound, tests) of n texts from random laws."""
    k, rule = chance.randint(1, 4), chance.choice(sorted(RULES))
    p, q, laws = some_laws(chance, n, k)
    text = emitted(RULES[rule], p, q, n, chance.randrange(10**9))
    found = examine(text, p).values()
    return f"{rule}, k = {k}, {laws}", max(z / test.bound for test, z in found), len(found)


def break_one(chance: random.Random) -> tuple[str, float]:
    """(name, total variation) of a mistake on the pair of models on which all of them show."""
    name = chance.choice(sorted(mistakes.MISTAKES))
    rule, drafter, sampling = mistakes.MISTAKES[name]
    shape = dict(vocab_size=4, n_ids=3, context=8, scale=4.0)
    target, draft = make_model(2, 16, 3, **shape), make_model(1, 8, 4, **shape)
    law = engine_law(target, drafter(draft), [1, 0], sampling, 2, 3, rule=rule, merged=False)
    return name, total_variation(law, own_law(target, [1, 0], Sampling(0) if sampling.temperature == 0 else sampling, 3))


def soak(seconds: float, seed: int = 0, n: int = 20_000, say=print) -> dict:
    """Run until ``seconds`` have passed; returns the figures, ``failures`` among them."""
    began = said = time.monotonic()
    figures = {"laws": 0, "texts enumerated": 0, "largest total variation": 0.0, "tests": 0, "draws": 0,
               "largest z ÷ bound": 0.0, "mistakes tried": 0, "mistakes rejected": 0}  # fmt: skip
    failures, round_ = [], 0
    while time.monotonic() - began < seconds or round_ < 3:
        chance = random.Random(f"{seed} {round_}")
        if round_ % 10 == 2:
            name, figure = break_one(chance)
            figures["mistakes tried"] += 1
            figures["mistakes rejected"] += figure > NOTICED
            if figure <= NOTICED:
                failures.append(f"{name} was not noticed: total variation {figure:.1e}")
        elif round_ % 2:
            name, figure, tests = count_one(chance, n)
            figures["tests"] += tests
            figures["draws"] += n
            figures["largest z ÷ bound"] = max(figures["largest z ÷ bound"], figure)
            if figure > 1:
                failures.append(f"seed {seed}, round {round_}: z is {figure:.2f} times its bound: {name}")
        else:
            name, figure, texts = enumerate_one(chance)
            figures["laws"] += 1
            figures["texts enumerated"] += texts
            figures["largest total variation"] = max(figures["largest total variation"], figure)
            if figure > EXACT:
                failures.append(f"seed {seed}, round {round_}: total variation {figure:.1e}: {name}")
        round_ += 1
        if time.monotonic() - said > 60:
            said = time.monotonic()
            say(f"{(said - began) / 60:5.1f} min  " + line(figures))
    say(f"{(time.monotonic() - began) / 60:5.1f} min  " + line(figures))
    say(f"bounds: total variation {EXACT:g}; z ÷ bound 1; false alarm in any test {figures['tests'] * ALARM:.1e}")
    for failure in failures:
        say(f"FAILED  {failure}")
    return figures | {"failures": failures}


def line(figures: dict) -> str:
    return " · ".join(f"{name} {value:{',' if isinstance(value, int) else '.2g'}}" for name, value in figures.items())


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--seed", type=int, default=int(time.time()), help="another walk every time by default")
    chosen = options.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    raise SystemExit(bool(soak(60 * chosen.minutes, chosen.seed, say=lambda text: print(text, flush=True))["failures"]))
