"""The proof: the joint law of whole texts, through the real engine and its caches, and the mistakes it must reject.

Two tiny Transformers in float64 with random weights, real caches, the real `speculate`; `oracle.walk` takes every
branch of every decision. What it finds is compared with the product of the target's own conditional probabilities.
"""

import copy

import pytest
import torch
from conftest import EXACT, make_model
from mistakes import MISTAKES, Hole, Untruncated, untruncated
from oracle import engine_law, own_law, total_variation
from uncached import Uncached, differences

from specdec.drafting import AdaptiveDraftModel, DraftModel, PromptLookup
from specdec.engine import Trace, generate, speculate
from specdec.inference import ready, trimmed
from specdec.sampling import RULES, Randomness, Sampling

V, PROMPT = 3, [1, 0]
NOTICED = 1e-4  # a mistake must be a hundred million times further off than what is exact


def models(seed=1, n_ids=V, context=8, scale=6.0):
    return (
        make_model(2, 16, seed, vocab_size=n_ids + 1, n_ids=n_ids, context=context, scale=scale),
        make_model(1, 8, seed + 1, vocab_size=n_ids + 1, n_ids=n_ids, context=context, scale=scale),
    )


def compare(proof, name, drafter, target, k, n, *, rule="token-wise", sampling=Sampling(), prompt=PROMPT, **options):
    """Record how far the engine's law is from the target's own; returns the own law."""
    context = min(target.config.context, drafter.context or target.config.context)
    exact = own_law(target, prompt, sampling, n, stop=options.get("stop", ()), context=context)
    law = engine_law(target, drafter, prompt, sampling, k, n, rule=RULES[rule], **options)
    proof.law(f"{name}, {rule}, k = {k}, up to {n} tokens", law, exact)
    return exact


SETTINGS = {
    "T = 1": Sampling(), "T = 0.5": Sampling(0.5), "T = 1.7": Sampling(1.7), "T = 0": Sampling(0),
    "top-k 2": Sampling(top_k=2), "top-p 0.8": Sampling(top_p=0.8), "T = 0.9, top-k 2, top-p 0.9": Sampling(0.9, 2, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_joint_law_of_several_rounds(proof, rule, name):
    target, draft = models()
    for k in (1, 2, 3):
        compare(proof, name, DraftModel(draft), target, k, 3, rule=rule, sampling=SETTINGS[name])


@pytest.mark.thorough
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_longer_texts(proof, rule, k):
    target, draft = models()
    if k < 3:  # a million branches, otherwise
        compare(proof, "T = 1", DraftModel(draft), target, k, 4, rule=rule)
    compare(proof, "top-k 2", DraftModel(draft), target, k, 5 if k < 3 else 4, rule=rule, sampling=Sampling(top_k=2))


@pytest.mark.thorough
@pytest.mark.parametrize("rule", RULES)
def test_larger_vocabularies(proof, rule):
    for n_ids, k, n in ((4, 2, 3), (5, 1, 3), (5, 2, 2)):
        target, draft = models(seed=5, n_ids=n_ids)
        compare(proof, f"V = {n_ids}", DraftModel(draft), target, k, n, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_every_coin_by_itself(proof, rule):
    """Without merging coins that the rule cannot tell apart."""
    target, draft = models()
    compare(proof, "no coins merged", DraftModel(draft), target, 2, 3, rule=rule, merged=False)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_stop_token_inside_a_block(proof, rule, k):
    target, draft = models()
    n = 4 if k < 3 else 3
    exact = compare(proof, "stop token", DraftModel(draft), target, k, n, rule=rule, stop=(2,))
    assert {len(text) for text in exact} == set(range(1, n + 1))
    both = Sampling(1.7, 2, 0.9)
    compare(proof, "stop token, filtered", DraftModel(draft), target, k, n, rule=rule, stop=(0, 2), sampling=both)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_context_limit_inside_a_block(proof, rule, k):
    target, draft = models()
    for whose, pair in (("target's", (models(context=5)[0], draft)), ("draft's", (target, models(context=5)[1]))):
        exact = compare(proof, f"the {whose} context ends", DraftModel(pair[1]), pair[0], k, 9, rule=rule)
        assert {len(text) for text in exact} == {3}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_other_drafters(proof, rule, k):
    target, draft = models()
    fewer = torch.tensor([1, 2])  # q is zero at id 0
    drafters = {
        "a draft of fewer ids": DraftModel(trimmed(draft, fewer)), "prompt lookup": PromptLookup(V),
        "the target as its draft": DraftModel(target), "a draft that stops when unsure": AdaptiveDraftModel(draft, least=0.5),
    }  # fmt: skip
    for name, drafter in drafters.items():
        compare(proof, name, drafter, target, k, 4 if name == "prompt lookup" else 3, rule=rule)
    compare(proof, "a one-token prompt", DraftModel(draft), target, k, 3, rule=rule, prompt=[2])


# Every fast path is the same engine over other passes, and has to keep the same law.

FAST = {
    "passes of fixed shape, captured": (torch.float64, {"passes": "graphs"}, EXACT),
    "compiled passes": (torch.float64, {"passes": "compiled"}, EXACT),
    "compiled passes, float32": (torch.float32, {"passes": "compiled"}, 1e-5),
    "compiled passes, bfloat16": (torch.bfloat16, {"passes": "compiled"}, 1e-5),
    "exact passes, float32": (torch.float32, {"exact": True}, 1e-5),
    "exact passes, bfloat16": (torch.bfloat16, {"exact": True}, 1e-5),
}


@torch.inference_mode()
def law_of_passes(target, prompt, n):
    """The law of n tokens as the given passes themselves compute it, one token at a time."""
    law = {(): 1.0}
    for _ in range(n):
        longer = {}
        for text, weight in law.items():
            cache = target.new_cache()
            rows = [target(torch.tensor([[x]]), cache)[0, -1, :V] for x in (*prompt, *text)]
            probs = Sampling().probs(rows[-1]).double()
            longer |= {(*text, x): weight * p for x, p in enumerate((probs / probs.sum()).tolist())}
        law = longer
    return law


@pytest.mark.parametrize("rule", ["token-wise", pytest.param("block", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", FAST)
def test_fast_paths_keep_the_law(proof, rule, name):
    """In bfloat16 too: there the target's law is what its own passes compute, rounding included."""
    dtype, options, bound = FAST[name]
    target, draft = models()
    fast, drafter = ready(target, dtype, **options), DraftModel(ready(draft, dtype))
    law, exact = engine_law(fast, drafter, PROMPT, k=2, n=3, rule=RULES[rule]), law_of_passes(fast, PROMPT, 3)
    what = "total variation of joint laws" + ("" if bound == EXACT else ", float32 probabilities")
    proof.check(f"{name}, {rule}, k = 2, 3 tokens", what, total_variation(law, exact), bound, len(exact))


# Negative controls: each has been shipped by somebody, and each must be rejected by the same walk.


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_rejected(proof, name):
    rule, drafter, sampling = MISTAKES[name]
    target, draft = models(seed=3, scale=4.0)  # a pair on which even the smallest of these mistakes shows
    law = engine_law(target, drafter(draft), PROMPT, sampling, 2, 3, rule=rule, merged=False)
    exact = own_law(target, PROMPT, Sampling(0) if sampling.temperature == 0 else sampling, 3)
    proof.control(name, "total variation of joint laws", total_variation(law, exact), NOTICED)


def test_a_target_whose_cache_is_not_truncated_is_rejected(proof):
    target, draft = models()
    law = engine_law(untruncated(copy.deepcopy(target)), DraftModel(draft), PROMPT)
    distance = total_variation(law, own_law(target, PROMPT, Sampling(), 3))
    proof.control("the target's cache not truncated", "total variation of joint laws", distance, NOTICED)


def test_temperature_zero_is_one_text(proof):
    target, draft = models()
    for rule in RULES.values():
        law = engine_law(target, DraftModel(draft), PROMPT, Sampling(0), 2, 4, rule=rule)
        assert list(law.items()) == [(tuple(generate(target, PROMPT, max_new_tokens=4, sampling=Sampling(0))), 1.0)]


# A draft with a broken cache leaves the law exact: q is whatever the tokens were drawn from. Only comparison with the
# same engine without any cache finds it.


def rounds(target, drafter, k, seed, *, rule="token-wise", sampling=Sampling()):
    trace = Trace(keep_probs=True)
    options = dict(drafter=drafter, k=k, rule=RULES[rule], max_new_tokens=50, sampling=sampling, trace=trace)
    list(speculate(target, [1, 2, 3], randomness=Randomness(seed), **options))
    return trace.rounds


def large_pair():
    """Models whose next token depends on all of the text, so that one wrong row of a cache matters."""
    options = dict(vocab_size=40, n_ids=37, context=64, scale=14)
    return make_model(2, 16, 1, **options), make_model(1, 8, 2, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cached_decisions_equal_uncached_ones(proof, rule, k):
    target, draft = large_pair()
    for who, model in (("draft", draft), ("target as its own draft", target)):  # with the latter all is accepted
        cached = rounds(target, DraftModel(model), k, k, rule=rule)
        plain = rounds(Uncached(target), DraftModel(Uncached(model)), k, k, rule=rule)
        assert len(cached) == len(plain)
        different, largest = differences(zip(cached, plain))
        name = f"cached against uncached, {who}, {rule}, k = {k}"
        proof.check(name, "rounds decided differently", different, 0, len(cached))
        proof.check(name, "largest difference of a row of p or q", largest, EXACT, len(cached))


BROKEN = {
    "the draft's last token never fed": (lambda t, d: (t, Hole(d)), True),
    "the draft's cache not truncated": (lambda t, d: (t, Untruncated(d)), False),
    "the target's cache not truncated": (lambda t, d: (untruncated(copy.deepcopy(t)), DraftModel(d)), False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_caches_decide_differently(proof, name):
    build, own = BROKEN[name]
    target, draft = large_pair()
    model = target if own else draft  # the hole opens after a fully accepted block
    for k in (2, 3):  # at k = 1 a draft reads nothing that can be refused
        broken, plain = rounds(*build(target, model), k, k), rounds(Uncached(target), DraftModel(Uncached(model)), k, k)
        proof.control(name, "rounds decided differently", differences(zip(broken, plain))[0], 0, len(plain))


def test_the_hole_leaves_the_text_exact_and_costs_acceptance(proof):
    """Why comparing outputs does not find it: the law is the target's to the last digit."""
    target, draft = models()
    exact = own_law(target, PROMPT, Sampling(), 4)
    law = engine_law(target, Hole(draft), PROMPT, Sampling(), 1, 4)
    proof.law("a hole in the draft's cache leaves the text alone", law, exact)
    target, _ = large_pair()
    right, hole = (rounds(target, drafter(target), 1, 0, sampling=Sampling(0)) for drafter in (DraftModel, Hole))
    right, hole = (sum(r.accepted for r in found) / sum(len(r.drafted) for r in found) for found in (right, hole))
    proof.control("the draft's last token never fed", "drop of accepted ÷ drafted", right - hole, 0.01)
