import ctypes
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import total_variation, walk

from specdec.sampling import RULES, Numbers, Randomness, Sampling, expected_accepted, residual

KIND = {"token-wise": "first", "block": "last"}


def random_rows(n, V, seed, zeros=False):
    rows = torch.rand(n, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    if zeros:
        rows[:, seed % V] = 0
    return rows / rows.sum(-1, keepdim=True)


def emitted_law(rule, p, q, kind=None):
    """Law of the first k+1 tokens when one round's output is completed from p: equal to the product of rows of p."""
    k = q.shape[0]

    def experiment(oracle):
        drafted = torch.cat([oracle.choose(row) for row in q])
        n, following = rule(drafted, q, p, oracle)
        n = int(n)
        text = drafted[:n].tolist() + following.tolist()
        return tuple(text + [int(oracle.choose(p[i])) for i in range(len(text), k + 1)])

    return walk(experiment, kind)


def product_law(p):
    def experiment(oracle):
        return tuple(int(oracle.choose(row)) for row in p)

    return walk(experiment)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_one_round_has_the_targets_law(proof, name, seed):
    p, q = random_rows(3, 3, seed), random_rows(2, 3, seed + 100)
    proof.law(f"one round on random laws, {name}", emitted_law(RULES[name], p, q), product_law(p))


@pytest.mark.parametrize("name", RULES)
def test_merged_coins_give_the_same_law(name):
    p, q = random_rows(3, 3, 5), random_rows(2, 3, 6)
    full, merged = emitted_law(RULES[name], p, q), emitted_law(RULES[name], p, q, KIND[name])
    assert total_variation(full, merged) < 1e-12


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 10_000), V=st.integers(2, 4), k=st.integers(1, 2), zero_p=st.booleans(), zero_q=st.booleans())
@settings(max_examples=40)
def test_lossless_for_any_pair(proof, name, seed, V, k, zero_p, zero_q):
    p, q = random_rows(k + 1, V, seed, zero_p), random_rows(k, V, seed + 1, zero_q)
    proof.law(f"one round on any laws, with zeros, {name}", emitted_law(RULES[name], p, q, KIND[name]), product_law(p))


def accepted_on_average(name, p, q):
    def experiment(oracle):
        drafted = torch.tensor([int(oracle.choose(row)) for row in q], dtype=torch.long)
        return int(RULES[name](drafted, q, p, oracle)[0])

    return sum(n * weight for n, weight in walk(experiment, KIND[name]).items())


@pytest.mark.parametrize(("name", "expected"), [("token-wise", 10 / 9), ("block", 11 / 9)])
def test_worked_example(proof, name, expected):
    p = torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64)
    q = torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64)
    error = abs(accepted_on_average(name, p.repeat(3, 1), q.repeat(2, 1)) - expected)
    proof.check(f"worked example, {name}: {expected * 9:.0f}/9", "error of the expected accepted tokens", error, 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_block_never_keeps_fewer(proof, seed):
    p, q = random_rows(4, 3, seed), random_rows(3, 3, seed + 50)
    lost = accepted_on_average("token-wise", p, q) - accepted_on_average("block", p, q)
    proof.check("block verification, 40 random pairs, k = 3", "accepted tokens fewer than token-wise", lost, 1e-12, 1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_coins_weighed_instead_of_tossed(proof, name, k):
    """`expected_accepted` given the drafts, averaged over the drafts, is what the walk over all coins finds."""
    p, q = random_rows(k + 1, 3, k), random_rows(k, 3, k + 70)
    weighed = 0.0
    for drafted in itertools.product(range(3), repeat=k):
        x = torch.tensor(drafted, dtype=torch.long)
        weighed += float(q.gather(-1, x[:, None]).prod()) * expected_accepted(RULES[name], x, q, p)
    error = abs(weighed - accepted_on_average(name, p, q))
    proof.check(f"coins weighed instead of tossed, {name}", "error of the expected accepted tokens", error, 1e-12, 3**k)
    with pytest.raises(ValueError, match="reads its coins is not known"):
        expected_accepted(lambda *_: None, torch.tensor([0]), q, p)


def test_coins_of_a_rule_that_a_reader_adds_are_not_guessed(monkeypatch):
    from functools import partial

    another = partial(RULES["token-wise"])
    monkeypatch.setitem(RULES, "another", another)
    with pytest.raises(ValueError, match="reads its coins is not known"):
        expected_accepted(another, torch.tensor([0]), random_rows(1, 3, 0), random_rows(2, 3, 1))


@pytest.mark.parametrize("rule", RULES.values())
def test_equal_laws_accept_everything_and_disjoint_ones_nothing(rule):
    p = random_rows(4, 6, 1)
    drafted = torch.tensor([0, 3, 5])
    assert rule(drafted, p[:3], p, Randomness(0))[0] == 3
    p = torch.tensor([[0.5, 0.5, 0, 0]]).repeat(3, 1)
    q = torch.tensor([[0, 0, 0.5, 0.5]]).repeat(2, 1)
    for seed in range(20):
        n, following = rule(torch.tensor([2, 3]), q, p, Randomness(seed))
        assert n == 0 and int(following) in (0, 1)


@pytest.mark.parametrize("rule", RULES.values())
def test_no_drafts_is_a_plain_step(rule):
    p = torch.tensor([[0.0, 1.0]])
    n, following = rule(torch.empty(0, dtype=torch.long), torch.empty(0, 2), p, Randomness(0))
    assert n == 0 and following.tolist() == [1]


def test_residual_of_equal_laws_is_the_law():
    p = random_rows(1, 5, 0)[0]
    assert torch.equal(residual(p, p), p)


def test_temperature_zero_is_one_hot_on_the_argmax():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    probs = Sampling(0).probs(logits)
    assert torch.equal(probs.argmax(-1), logits.argmax(-1)) and torch.equal(probs.sum(-1), torch.ones(6))
    assert (probs > 0).sum() == 6


def test_extreme_temperatures():
    logits = torch.tensor([3.0, 1.0, 2.999])
    assert Sampling(1e-6).probs(logits).tolist() == [1, 0, 0]
    assert torch.allclose(Sampling(1e6).probs(logits), torch.full((3,), 1 / 3), atol=1e-5)


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 30), top_p=st.floats(0.01, 1), T=st.floats(0.05, 5))
@settings(max_examples=60)
def test_filters_keep_the_most_probable(seed, top_k, top_p, T):
    logits = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = Sampling(T).probs(logits)
    probs = Sampling(T, top_k, top_p).probs(logits)
    kept = probs > 0
    assert probs.sum().item() == pytest.approx(1) and 1 <= kept.sum() <= top_k
    assert plain[kept].min() >= plain[~kept].max() if (~kept).any() else True
    assert torch.allclose(probs[kept], plain[kept] / plain[kept].sum())  # ratios are kept


def test_top_p_keeps_the_smallest_sufficient_set():
    probs = Sampling(top_p=0.7).probs(torch.tensor([0.5, 0.3, 0.15, 0.05]).log())
    assert torch.allclose(probs, torch.tensor([0.625, 0.375, 0, 0]))
    assert (Sampling(top_p=0.5).probs(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()) > 0).sum() in (1, 2)


def test_top_k_with_ties_keeps_no_more():
    assert (Sampling(top_k=2).probs(torch.zeros(9)) > 0).sum() == 2
    assert torch.allclose(Sampling(top_k=99).probs(torch.zeros(9)), torch.full((9,), 1 / 9))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_logit_names_its_model(value):
    with pytest.raises(ValueError, match="the draft model produced a logit that is not finite"):
        Sampling().probs(torch.tensor([0.0, value]), "draft model")


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"temperature": -0.1}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_k": 0}, "top_k"),
     ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")],
)  # fmt: skip
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**bad)


@pytest.mark.parametrize("weights", [[2, 1, 1], [0, 1, 0, 2, 0, 1, 0], [0, 4], [4, 0]])
@pytest.mark.parametrize("total", [1.0, 1 + 1e-6], ids=["exact", "rounded"])
def test_choose_inverts_the_distribution(weights, total):
    """Of 16 equidistant numbers each id gets its share, from the first id to the last, and none goes to an id of probability
    zero, though every border is one of these numbers. A sum that rounding has moved takes nothing from the last id."""
    probs = torch.tensor(weights, dtype=torch.float64) * total / 4
    drawn = [int(Numbers(torch.tensor([i / 16], dtype=torch.float64)).choose(probs)) for i in range(16)]
    assert drawn == [i for i, weight in enumerate(weights) for _ in range(4 * weight)]
    assert int(Numbers(torch.tensor([1 - 2**-53], dtype=torch.float64)).choose(probs)) == max(i for i, weight in enumerate(weights) if weight)


def test_choose_never_picks_what_is_impossible():
    randomness = Randomness(0)
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    drawn = torch.cat([randomness.choose(probs) for _ in range(4000)])
    counts = drawn.bincount(minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert abs(counts[1].item() / 4000 - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_equal_seeds_equal_draws():
    p = random_rows(1, 50, 3)[0]
    a, b = ([int(Randomness(seed).choose(p)) for seed in range(30)] for _ in range(2))
    assert a == b and len(set(a)) > 3


@pytest.mark.parametrize("seed", [10**23, 2**64, -(2**63) - 1])
def test_seeds_of_more_bits_than_there_are(seed):
    with pytest.raises(ValueError, match="give a number of 64 bits"):
        Randomness(seed)


def test_numbers_that_are_drawn_ahead_are_each_given_once():
    """In order, none twice, and more than are drawn at once too; as tensors or where they lie."""
    randomness = Randomness(3)
    randomness.many = 8
    given = [randomness.uniforms(n) for n in (1, 3, 4, 2, 7)]
    given.append(torch.tensor((ctypes.c_double * 20).from_address(randomness.address(20)), dtype=torch.float64))
    given.append(randomness.uniforms(1))
    assert [len(numbers) for numbers in given] == [1, 3, 4, 2, 7, 20, 1]
    everything = torch.cat(given)
    assert len(everything.unique()) == len(everything) and ((0 <= everything) & (everything < 1)).all()
    assert torch.equal(torch.cat(given[:3]), Randomness(3).uniforms(8))


def test_a_coin_of_probability_zero_never_falls_well():
    """Not even for the uniform number 0, which comes once in 2⁵³ times."""
    coins = Numbers(torch.tensor([0.0, 0.5, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert coins.flips(torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist() == [False, False, True, True]


def test_one_row_that_is_not_finite_leaves_the_others_alone():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    wanted = Sampling(0.7).probs(logits)
    logits[1, 4] = float("inf")
    probs = Sampling(0.7).probs_or_nan(logits)
    assert probs[1].isnan().all() and torch.equal(probs[[0, 2]], wanted[[0, 2]])
