"""The proof: the joint law of whole texts, through the real engine and its caches, and the mistakes it must reject.

Two tiny Transformers in float64 with random weights, real caches, the real `speculate`; `oracle.walk` takes every
branch of every decision. What it finds is compared with the product of the target's own conditional probabilities.
"""

from dataclasses import astuple

import pytest
import torch
from conftest import EXACT, make_model
from mistakes import MISTAKES, DraftKeepsRefusedRow, DraftNeverTruncated, Hole, KeepsRefusedRow, NeverTruncated, with_cache
from oracle import engine_law, own_law, total_variation
from uncached import Uncached, differences

from specdec.drafting import AdaptiveDraftModel, DraftModel, PromptLookup
from specdec.engine import Trace, generate, speculate
from specdec.inference import ready, trimmed
from specdec.sampling import RULES, Randomness, Sampling

V, PROMPT = 3, [1, 0]
NOTICED = 1e-4  # a mistake must be a hundred million times further off than what is exact


# On B every mistake shows. A is another look at what is right, and blind to one of them: block verification without the
# weight P in the residual is exact on it.
PAIRS = {"A": dict(seed=1, scale=6.0), "B": dict(seed=3, scale=4.0)}


def models(pair="B", n_ids=V, context=8):
    seed, scale = PAIRS[pair].values()
    return (
        make_model(2, 16, seed, vocab_size=n_ids + 1, n_ids=n_ids, context=context, scale=scale),
        make_model(1, 8, seed + 1, vocab_size=n_ids + 1, n_ids=n_ids, context=context, scale=scale),
    )


def compare(proof, name, drafter, target, k, n, *, rule="token-wise", sampling=Sampling(), prompt=PROMPT, **options):
    """Record how far the engine's law is from the target's own; returns the own law."""
    exact = own_law(target, prompt, sampling, n, stop=options.get("stop", ()))
    law = engine_law(target, drafter, prompt, sampling, k, n, rule=RULES[rule], **options)
    proof.law(f"{name}, {rule}, k = {k}, up to {n} tokens", law, exact)
    return exact


# Drafts a round. A single one is judged alike by both rules, of which one test takes care; the block rule begins at two.
# No more is drafted than can be used, so that three take a text of four: in the fast tests one of only two ids.
CASES = [("token-wise", 1), ("token-wise", 2), ("token-wise", 3), ("block", 2), ("block", 3)]
SETTINGS = {
    "T = 1": Sampling(), "T = 0.5": Sampling(0.5), "T = 1.7": Sampling(1.7), "T = 0": Sampling(0),
    "top-k 2": Sampling(top_k=2), "top-p 0.8": Sampling(top_p=0.8), "T = 0.9, top-k 2, top-p 0.9": Sampling(0.9, 2, 0.9),
}  # fmt: skip
TWO_IDS = {name: sampling for name, sampling in SETTINGS.items() if sampling.top_k == 2}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("rule", "k"), CASES)
def test_joint_law_of_several_rounds(proof, rule, k, pair):
    target, draft = models(pair)
    for name, sampling in (TWO_IDS if k == 3 else SETTINGS).items():
        n = 4 if k == 3 else 3
        compare(proof, f"{name}, pair {pair}", DraftModel(draft), target, k, n, rule=rule, sampling=sampling)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_draft_is_judged_alike(proof, pair):
    target, draft = models(pair)
    compare(proof, f"T = 1, pair {pair}", DraftModel(draft), target, 1, 3, rule="block")


@pytest.mark.thorough
@pytest.mark.parametrize(("rule", "k"), CASES)
def test_longer_texts(proof, rule, k):
    target, draft = models()
    compare(proof, "T = 1", DraftModel(draft), target, k, 4, rule=rule)
    if k < 3:
        compare(proof, "top-k 2", DraftModel(draft), target, k, 5, rule=rule, sampling=Sampling(top_k=2))


@pytest.mark.thorough
@pytest.mark.parametrize("rule", RULES)
def test_larger_vocabularies(proof, rule):
    for n_ids in (4, 5):
        target, draft = models(n_ids=n_ids)
        compare(proof, f"V = {n_ids}", DraftModel(draft), target, 2, 3, rule=rule)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", RULES)
def test_every_coin_by_itself(proof, rule, pair):
    """Without merging coins that the rule cannot tell apart."""
    target, draft = models(pair)
    compare(proof, f"no coins merged, pair {pair}", DraftModel(draft), target, 2, 3, rule=rule, merged=False)


@pytest.mark.parametrize(("rule", "k"), CASES)
def test_a_stop_token_inside_a_block(proof, rule, k):
    target, draft = models()
    if k < 3:
        exact = compare(proof, "stop token", DraftModel(draft), target, k, 4, rule=rule, stop=(2,))
        assert {len(text) for text in exact} == {1, 2, 3, 4}
    both = Sampling(1.7, 2, 0.9)
    compare(proof, "stop token, filtered", DraftModel(draft), target, k, 4, rule=rule, stop=(0, 2), sampling=both)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("rule", "k"), CASES)
def test_the_context_limit_inside_a_block(proof, rule, k, pair):
    """The target's ends the text; beyond the draft's, which is to cut every k short here, the target goes on alone."""
    target, draft = models(pair)
    short, _ = models(pair, context=5)
    exact = compare(proof, f"the target's context ends, pair {pair}", DraftModel(draft), short, k, 9, rule=rule)
    assert {len(text) for text in exact} == {3}
    _, short = models(pair, context=3)
    name, sampling = f"the draft's context ends, top-k 2, pair {pair}", Sampling(top_k=2)
    exact = compare(proof, name, DraftModel(short), target, k, 4, rule=rule, sampling=sampling)
    assert {len(text) for text in exact} == {4}


class StopsByToken(DraftModel):
    """Drafts on only while it has not drawn id 0, which it proposes all the same: a stop may go by what was drawn."""

    def offered(self, token, q):
        self.newest = int(token)
        return super().offered(token, q)

    def goes_on(self, rows):
        return not rows or self.newest != 0


@pytest.mark.parametrize(("rule", "k"), CASES)
def test_other_drafters(proof, rule, k):
    target, draft = models()
    fewer = torch.tensor([1, 2])  # q is zero at id 0
    drafters = {
        "a draft of fewer ids": DraftModel(trimmed(draft, fewer)), "prompt lookup": PromptLookup(V),
        "the target as its draft": DraftModel(target), "a draft that stops when unsure": AdaptiveDraftModel(draft, least=0.5),
        "a draft that stops by what it drew": StopsByToken(draft),
    }  # fmt: skip
    where, sampling, n = (", top-k 2", Sampling(top_k=2), 4) if k == 3 else ("", Sampling(), 3)
    options = dict(rule=rule, sampling=sampling)
    for name, drafter in drafters.items():
        compare(proof, name + where, drafter, target, k, 4 if name == "prompt lookup" else n, **options)
    compare(proof, f"a one-token prompt{where}", DraftModel(draft), target, k, n, **options, prompt=[2])


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


# Negative controls: each must be rejected by the same walk, on a pair, with a k and in a setting where it also finds what
# is right to be exact. mistakes.py says which were seen in other people's code, and where; the others are easy to make.


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_rejected(proof, name):
    rule, drafter, sampling = MISTAKES[name]
    assert astuple(sampling) in [astuple(setting) for setting in SETTINGS.values()]
    target, draft = models("B")
    law = engine_law(target, drafter(draft), PROMPT, sampling, 2, 3, rule=rule, merged=False)
    exact = own_law(target, PROMPT, Sampling(0) if sampling.temperature == 0 else sampling, 3)
    proof.control(name, "total variation of joint laws", total_variation(law, exact), NOTICED)


CACHES = {"a refused row kept in the target's cache": KeepsRefusedRow, "the target's cache never truncated": NeverTruncated}


@pytest.mark.parametrize("name", CACHES)
def test_a_target_with_a_broken_cache_is_rejected(proof, name):
    target, draft = models()
    law = engine_law(with_cache(target, CACHES[name]), DraftModel(draft), PROMPT)
    distance = total_variation(law, own_law(target, PROMPT, Sampling(), 3))
    proof.control(name, "total variation of joint laws", distance, NOTICED)


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
    options = dict(vocab_size=40, n_ids=37, context=256, scale=14)  # room for all that a cache never truncated keeps
    return make_model(2, 16, 1, **options), make_model(1, 8, 2, **options)


@pytest.mark.parametrize(("rule", "k"), [*CASES, ("token-wise", 5), ("block", 5)])
def test_cached_decisions_equal_uncached_ones(proof, rule, k):
    target, draft = large_pair()
    for who, model in (("draft", draft), ("target as its own draft", target)):  # with the latter all is accepted
        cached = rounds(target, DraftModel(model), k, k, rule=rule)
        plain = rounds(Uncached(target), DraftModel(Uncached(model)), k, k, rule=rule)
        assert len(cached) == len(plain)
        different, largest = differences(cached, plain)
        name = f"cached against uncached, {who}, {rule}, k = {k}"
        proof.check(name, "rounds decided differently", different, 0, len(cached))
        proof.check(name, "largest difference of a row of p or q", largest, EXACT, len(cached))


BROKEN = {
    "the draft's last token never fed": (lambda t, d: (t, Hole(d)), True),
    "a refused row kept in the draft's cache": (lambda t, d: (t, DraftKeepsRefusedRow(d)), False),
    "the draft's cache never truncated": (lambda t, d: (t, DraftNeverTruncated(d)), False),
    "a refused row kept in the target's cache": (lambda t, d: (with_cache(t, KeepsRefusedRow), DraftModel(d)), False),
    "the target's cache never truncated": (lambda t, d: (with_cache(t, NeverTruncated), DraftModel(d)), False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_caches_decide_differently(proof, name):
    build, own = BROKEN[name]
    target, draft = large_pair()
    model = target if own else draft  # the hole opens after a fully accepted block
    for k in (2, 3):  # at k = 1 a draft reads nothing that can be refused
        broken, plain = rounds(*build(target, model), k, k), rounds(Uncached(target), DraftModel(Uncached(model)), k, k)
        proof.control(name, "rounds decided differently", differences(broken, plain)[0], 0, len(plain))


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
