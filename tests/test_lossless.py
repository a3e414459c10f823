"""The proof: the joint law of whole texts, through the real engine and its caches, and the mistakes it must reject."""

import itertools

import pytest
import torch
from conftest import make_model
from oracle import total_variation, walk

from specdec.drafting import Draft, DraftModel, PromptLookup
from specdec.engine import speculate
from specdec.sampling import RULES, Sampling, block, residual, token_wise

V, PROMPT = 3, [1, 0]
KIND = {token_wise: "first", block: "last"}


def models(seed=1, scale=6.0):
    return (
        make_model(2, 16, seed, vocab_size=4, n_ids=V, context=8, scale=scale),
        make_model(1, 8, seed + 1, vocab_size=4, n_ids=V, context=8, scale=scale),
    )


@torch.inference_mode()
def own_law(target, sampling, n, stop=()):
    """The target's law of texts of up to n tokens, by its own conditional probabilities without any cache."""
    law = {(): 1.0}
    for _ in range(n):
        longer = {}
        for text, weight in law.items():
            if text and text[-1] in stop or len(PROMPT) + len(text) == target.config.context:
                longer[text] = longer.get(text, 0) + weight
                continue
            row = sampling.probs(target(torch.tensor([PROMPT + list(text)]))[0, -1, :V])
            for x, p in enumerate(row.tolist()):
                if p:
                    longer[text + (x,)] = weight * p
        law = longer
    return law


def engine_law(target, drafter, sampling, k, n, rule=token_wise, stop=(), kind="auto"):
    def experiment(oracle):
        return tuple(
            speculate(target, PROMPT, drafter=drafter, k=k, rule=rule, max_new_tokens=n, sampling=sampling, stop=stop,
                      randomness=oracle)
        )  # fmt: skip

    return walk(experiment, KIND.get(rule) if kind == "auto" else kind)


SETTINGS = {
    "T=1": Sampling(), "T=0.5": Sampling(0.5), "T=1.7": Sampling(1.7), "T=0": Sampling(0), "top-k": Sampling(top_k=2),
    "top-p": Sampling(top_p=0.8), "both": Sampling(0.9, 2, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_joint_law_of_several_rounds(rule, name):
    target, draft = models()
    n = 4 if name in ("T=1", "top-k", "T=0") else 3
    exact = own_law(target, SETTINGS[name], n)
    for k in (1, 2):
        law = engine_law(target, DraftModel(draft), SETTINGS[name], k, n, RULES[rule])
        assert total_variation(law, exact) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_three_drafts_a_round(rule):
    target, draft = models()
    law = engine_law(target, DraftModel(draft), Sampling(top_k=2), 3, 4, RULES[rule])
    assert total_variation(law, own_law(target, Sampling(top_k=2), 4)) < 1e-12


def test_every_coin_by_itself():
    """Without merging coins that the rule cannot tell apart."""
    target, draft = models()
    for rule in RULES.values():
        law = engine_law(target, DraftModel(draft), Sampling(), 2, 3, rule, kind=None)
        assert total_variation(law, own_law(target, Sampling(), 3)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_stop_token_and_the_context_limit_inside_a_block(rule):
    target, draft = models()
    exact = own_law(target, Sampling(), 4, stop=(2,))
    assert total_variation(engine_law(target, DraftModel(draft), Sampling(), 2, 4, RULES[rule], stop=(2,)), exact) < 1e-12
    short = make_model(2, 16, 1, vocab_size=4, n_ids=V, context=5)
    exact = own_law(short, Sampling(), 9)
    assert {len(text) for text in exact} == {3}
    assert total_variation(engine_law(short, DraftModel(draft), Sampling(), 2, 9, RULES[rule]), exact) < 1e-12


class _FewerIds(DraftModel):
    """A draft that never proposes id 0: q is zero there."""

    def propose(self, text, k, sampling, randomness):
        unread, tokens, rows = torch.tensor([text[self.cache.length :]]), [], []
        for _ in range(k):
            logits = self.model(unread, self.cache)[0, -1, : self.n_ids]
            q = torch.cat([torch.zeros(1, dtype=logits.dtype), sampling.probs(logits[1:])])
            tokens.append(randomness.choose(q))
            rows.append(q)
            unread = tokens[-1][None]
        if not tokens:
            return Draft(torch.empty(0, dtype=torch.long), torch.empty(0, self.n_ids))
        return Draft(torch.cat(tokens), torch.stack(rows))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", [_FewerIds(models()[1]), PromptLookup(V)], ids=["fewer ids", "prompt lookup"])
def test_other_drafters(rule, drafter):
    target, _ = models()
    law = engine_law(target, drafter, Sampling(), 2, 4, RULES[rule])
    assert total_variation(law, own_law(target, Sampling(), 4)) < 1e-12


# Negative controls: each has been shipped by somebody, and each must be rejected by the same walk.


def always_accept(drafted, q, p, randomness):
    return len(drafted), randomness.choose(p[-1])


def residual_forgotten(drafted, q, p, randomness):
    n, following = token_wise(drafted, q, p, randomness)
    return n, following if n == len(drafted) else randomness.choose(p[n])


def p_and_q_swapped(drafted, q, p, randomness):
    return token_wise(drafted, p[: len(drafted)], torch.cat([q, p[len(drafted) :]]), randomness)


def soft_q_for_argmax_drafts(drafted, q, p, randomness):
    return token_wise(drafted, (q + 0.3) / (q + 0.3).sum(-1, keepdim=True), p, randomness)


def one_coin_for_all(drafted, q, p, randomness):
    if not len(drafted):
        return 0, randomness.choose(p[0])
    ratio = torch.stack([(p[i, x] / q[i, x]).clamp(max=1) for i, x in enumerate(drafted)])
    # one uniform u for every position: x₁ … xᵢ stay while u is below the smallest ratio so far
    lowest = ratio.cummin(0).values
    before, accepted = 1.0, 0
    for low in lowest:
        if not bool(randomness.flips((low / before).reshape(1))[0]):
            break
        before, accepted = low, accepted + 1
    if accepted == len(drafted):
        return accepted, randomness.choose(p[accepted])
    return accepted, randomness.choose(residual(p[accepted], q[accepted]))


def block_stops_at_the_first_failure(drafted, q, p, randomness):
    class FirstFailure:
        choose = staticmethod(randomness.choose)

        @staticmethod
        def flips(probs):
            return randomness.flips(probs).long().cumprod(0).bool()

    return block(drafted, q, p, FirstFailure)


def block_residual_without_its_weight(drafted, q, p, randomness):
    n, following = block(drafted, q, p, randomness)
    return n, following if n == len(drafted) else randomness.choose(residual(p[n], q[n]))


class _ArgmaxDrafts(DraftModel):
    """Drafts greedily, and hands over the soft q."""

    def propose(self, text, k, sampling, randomness):
        class Greedy:
            choose = staticmethod(lambda probs: probs.argmax(-1, keepdim=True))

        return super().propose(text, k, sampling, Greedy)


class _DropsUnlikely(DraftModel):
    """Stops drafting when the token it has just drawn looks unlikely, and drops that token."""

    def propose(self, text, k, sampling, randomness):
        draft = super().propose(text, k, sampling, randomness)
        for i, x in enumerate(draft.tokens):
            if draft.probs[i, x] < 0.4:
                return Draft(draft.tokens[:i], draft.probs[:i])
        return draft


class _Unfiltered(DraftModel):
    """Samples after the filter and reports q before it."""

    def propose(self, text, k, sampling, randomness):
        draft = super().propose(text, k, sampling, randomness)
        rows = []
        for i in range(len(draft.tokens)):
            with torch.no_grad():
                logits = self.model(torch.tensor([text + draft.tokens[:i].tolist()]))[0, -1, : self.n_ids]
            rows.append(Sampling(sampling.temperature).probs(logits))
        return Draft(draft.tokens, torch.stack(rows)) if rows else draft


CONTROL_SEED = 3  # a pair on which even the smallest of these mistakes shows
CONTROLS = {
    "always accept": (always_accept, DraftModel, Sampling(), 1e-2),
    "residual forgotten": (residual_forgotten, DraftModel, Sampling(), 1e-2),
    "p and q swapped": (p_and_q_swapped, DraftModel, Sampling(), 1e-2),
    "ratio with another q": (soft_q_for_argmax_drafts, DraftModel, Sampling(), 1e-2),
    "same uniform for every position": (one_coin_for_all, DraftModel, Sampling(), 1e-3),
    "block: stop at the first failure": (block_stops_at_the_first_failure, DraftModel, Sampling(), 1e-3),
    "block: residual without its weight": (block_residual_without_its_weight, DraftModel, Sampling(), 1e-3),
    "argmax drafts, soft q": (token_wise, _ArgmaxDrafts, Sampling(), 1e-2),
    "a drawn token dropped": (token_wise, _DropsUnlikely, Sampling(), 1e-3),
    "q before the filter": (token_wise, _Unfiltered, Sampling(top_k=2), 1e-3),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_negative_controls_are_rejected(name):
    rule, drafter, sampling, at_least = CONTROLS[name]
    target, draft = models(seed=CONTROL_SEED, scale=4.0)
    law = engine_law(target, drafter(draft), sampling, 2, 3, rule, kind=None)
    assert total_variation(law, own_law(target, sampling, 3)) > at_least


def test_a_target_cache_that_is_not_rolled_back_is_rejected(monkeypatch):
    target, draft = models()
    exact = own_law(target, Sampling(), 3)
    monkeypatch.setattr("specdec.model.KVCache.truncate", _keeps_one_row_too_many)
    broken = engine_law(target, DraftModel(draft), Sampling(), 2, 3)
    assert total_variation(broken, exact) > 1e-3


def _keeps_one_row_too_many(cache, length):
    """Rejected rows stay where they are and the next token overwrites the wrong one."""
    if length == 0:
        cache.length = 0
    elif cache.length > length:
        cache.k[..., length - 1, :] = cache.k[..., length, :]
        cache.v[..., length - 1, :] = cache.v[..., length, :]
        cache.length = length


def test_temperature_zero_is_the_argmax_even_in_ties():
    """Ratios of softmaxes pick wrong tokens at temperature 0; one-hot rows cannot."""
    target, draft = models()
    law = engine_law(target, DraftModel(draft), Sampling(0), 2, 4)
    exact = own_law(target, Sampling(0), 4)
    assert law == exact and len(law) == 1


@pytest.mark.parametrize("seed", range(3))
def test_padding_ids_have_no_mass(seed):
    target = make_model(2, 16, seed, vocab_size=8, n_ids=V, context=8)
    with torch.no_grad():
        target.head.weight[V:] = 100 * target.head.weight[0]  # padding rows that would win if they were looked at
    law = engine_law(target, DraftModel(target), Sampling(2.0), 2, 3)
    assert {x for text in law for x in text} <= set(range(V)) and sum(law.values()) == pytest.approx(1)
    assert len(law) == len(list(itertools.product(range(V), repeat=3)))
