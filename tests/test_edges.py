"""Where things end or go wrong: the edges of settings, laws and lengths, weights that break, ids that are only padding."""

import math
from dataclasses import dataclass

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import engine_law, own_law

from specdec.drafting import Draft, DraftModel, PromptLookup, no_draft
from specdec.engine import Trace, generate, speculate
from specdec.model import ModelConfig, Transformer
from specdec.profiles import Phase, Schedule
from specdec.sampling import RULES, Randomness, Sampling
from specdec.train import train

EXTREME = {
    "T = 1e-6": Sampling(1e-6), "T = 1e6": Sampling(1e6), "T = 1e-60": Sampling(1e-60), "T = 1e60": Sampling(1e60),
    "top-k 1": Sampling(top_k=1), "top-k above V": Sampling(top_k=99), "top-p 1e-9": Sampling(top_p=1e-9),
    "top-p 1": Sampling(top_p=1.0), "everything at once": Sampling(1e-6, 1, 1e-9),
}  # fmt: skip


def small_pair(seed=1, **options):
    options = dict(vocab_size=4, n_ids=3, context=8) | options
    return make_model(2, 16, seed, **options), make_model(1, 8, seed + 1, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_settings_keep_the_law(proof, rule, name):
    target, draft = small_pair()
    exact = own_law(target, [1], EXTREME[name], 3)
    law = engine_law(target, DraftModel(draft), [1], EXTREME[name], 2, 3, rule=RULES[rule])
    proof.law(f"{name}, {rule}", law, exact)
    if EXTREME[name].temperature <= 1e-6 or EXTREME[name].top_k == 1 or EXTREME[name].top_p == 1e-9:
        assert max(law, key=law.get) == tuple(generate(target, [1], max_new_tokens=3, sampling=Sampling(0)))
        assert max(law.values()) == pytest.approx(1)
    if EXTREME[name].temperature >= 1e6:
        assert max(law.values()) == pytest.approx(1 / 27, rel=1e-3)


@pytest.mark.parametrize("temperature", [1e-300, 1e-60, 1e-6, 1e6, 1e60, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_temperatures_are_probabilities(temperature, dtype):
    logits = torch.tensor([[3.0, -1.0, 2.9, 3.0], [-80.0, 80.0, 0.0, 0.0]], dtype=dtype)
    probs = Sampling(temperature).probs(logits)
    assert probs.isfinite().all() and torch.allclose(probs.sum(-1), torch.ones_like(probs[:, 0]))
    assert probs[1, 1] == 1 if temperature < 1 else torch.allclose(probs, torch.full_like(probs, 1 / 4), atol=1e-3)


class Only(DraftModel):
    """Proposes one id and nothing else, whatever the text."""

    def __init__(self, model, token):
        super().__init__(model)
        self.token = token

    def propose(self, text, k, sampling, randomness):
        tokens = torch.full((k,), self.token)
        return Draft(tokens, torch.nn.functional.one_hot(tokens, self.n_ids).double()) if k else no_draft(self.n_ids, "cpu")


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_that_is_never_right(proof, rule):
    """p and q without a common id: nothing is accepted, and the law is still p."""
    target, draft = small_pair()
    sampling = Sampling(top_k=2)
    exact = own_law(target, [1], sampling, 3)
    row = sampling.probs(target(torch.tensor([[1]]))[0, -1, :3].detach())
    wrong = int(row.argmin())
    law = engine_law(target, Only(draft, wrong), [1], sampling, 2, 3, rule=RULES[rule])
    proof.law(f"a draft of one id, {rule}", law, exact)
    for seed in range(10):
        trace = Trace()
        list(speculate(target, [1], drafter=Only(draft, wrong), k=3, rule=RULES[rule], max_new_tokens=5, sampling=sampling,
                       randomness=Randomness(seed), trace=trace))  # fmt: skip
        assert trace.rounds[0].accepted == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(1.7, 3, 0.9)])
def test_a_draft_that_is_the_target_is_always_right(rule, sampling):
    target, _ = small_pair(vocab_size=40, n_ids=37, context=64)
    for seed in range(5):
        trace = Trace()
        out = list(speculate(target, [1], drafter=DraftModel(target), k=4, rule=RULES[rule], max_new_tokens=40, sampling=sampling,
                             randomness=Randomness(seed), trace=trace))  # fmt: skip
        assert len(out) == 40 and all(r.accepted == len(r.drafted) for r in trace.rounds) and len(trace.rounds) == 8


@dataclass(frozen=True)
class WithoutLooking(Sampling):
    """As on an accelerator and in compiled passes: a bad row becomes NaN, and the engine sees the token it gives."""

    def probs(self, logits, model="model"):
        return self.probs_or_nan(logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("culprit", ["target", "draft model"])
@pytest.mark.parametrize("sampling", [kind(*a) for kind in (Sampling, WithoutLooking) for a in ((), (0,), (0.5, 2, 0.9))])
def test_a_logit_that_is_not_finite_names_its_model(value, culprit, sampling):
    target, draft = small_pair()
    broken = target if culprit == "target" else draft
    hook = broken.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([1]), value))
    with pytest.raises(ValueError, match=f"the {culprit} produced a logit that is not finite"):
        list(speculate(target, [1], drafter=DraftModel(draft), k=2, max_new_tokens=4, sampling=sampling))
    if culprit == "target":
        with pytest.raises(ValueError, match="the target produced a logit that is not finite"):
            list(generate(target, [1], max_new_tokens=4, sampling=sampling))
    hook.remove()
    assert len(list(speculate(target, [1], drafter=DraftModel(draft), k=2, max_new_tokens=4, sampling=sampling))) == 4


@pytest.mark.parametrize("prompt", [[], ()])
def test_an_empty_prompt_is_refused_by_both_arms(prompt):
    target, draft = small_pair()
    both = speculate(target, prompt, drafter=DraftModel(draft), k=1, max_new_tokens=1)
    for arm in (generate(target, prompt, max_new_tokens=1), both):
        with pytest.raises(ValueError, match="the prompt is empty; give at least one token"):
            list(arm)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_k_beyond_what_is_left(k):
    """No more is drafted than could be used: of the text, or of the context."""
    target, draft = small_pair()
    for prompt, n, room in (([1], 1, 1), ([1], 3, 3), ([1] * 7, 9, 1), ([1] * 5, 9, 3), ([1] * 8, 9, 0), ([1], 0, 0)):
        trace = Trace()
        options = dict(drafter=DraftModel(draft), k=k, max_new_tokens=n, trace=trace)
        out = list(speculate(target, prompt, randomness=Randomness(1), **options))
        assert len(out) == room and trace.finish == ("length" if n == room else "context")
        assert all(len(r.drafted) <= min(k, room - 1) for r in trace.rounds)


# Properties of any generation, over shapes, lengths and settings

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1.7, 1e6]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
)


@st.composite
def generations(draw):
    """(target, drafter, prompt, options) of some generation."""
    n_ids = draw(st.integers(2, 9))
    vocab_size = n_ids + draw(st.integers(0, 3))

    def model(seed):
        n_kv_heads = draw(st.sampled_from([1, 2, 4]))
        n_heads = n_kv_heads * draw(st.sampled_from([1, 2]))
        shape = draw(st.integers(1, 2)), n_heads, n_heads * draw(st.sampled_from([2, 4])), n_kv_heads
        config = ModelConfig(*shape, vocab_size=vocab_size, n_ids=n_ids, context=draw(st.integers(2, 16)), dropout=0.0)
        made = Transformer(config, torch.Generator().manual_seed(seed)).double().eval()
        with torch.no_grad():
            for weight in made.parameters():
                if weight.dim() == 2:
                    weight.mul_(6)
        return made

    target, draft = model(draw(st.integers(0, 99))), model(draw(st.integers(100, 199)))
    drafter = draw(st.sampled_from([DraftModel(draft), DraftModel(target), PromptLookup(n_ids)]))
    context = target.config.context
    prompt = draw(st.lists(st.integers(0, n_ids - 1), min_size=1, max_size=context))
    options = dict(
        k=draw(st.integers(1, 9)), rule=RULES[draw(st.sampled_from(sorted(RULES)))], max_new_tokens=draw(st.integers(0, 20)),
        sampling=draw(SAMPLINGS), stop=draw(st.sets(st.integers(0, n_ids - 1), max_size=1)),
    )  # fmt: skip
    return target, drafter, prompt, context, options


@given(generations(), st.integers(0, 2**31))
@settings(max_examples=120)
def test_what_holds_for_every_generation(generation, seed):
    target, drafter, prompt, context, options = generation
    n_ids, k, n = target.config.n_ids, options["k"], options["max_new_tokens"]
    traces, texts = [], []
    for _ in range(2):  # the drafter is used again: nothing of the first text may be left in it
        traces.append(Trace(keep_probs=True))
        texts.append(list(speculate(target, prompt, drafter=drafter, randomness=Randomness(seed), trace=traces[-1], **options)))
    trace, text = traces[0], texts[0]
    assert texts[0] == texts[1] == trace.tokens == traces[1].tokens  # the same seed, the same text

    room = min(n, context - len(prompt))
    stopped = bool(text) and text[-1] in options["stop"]
    assert trace.finish == ("stop" if stopped else "length" if len(prompt) + n <= context else "context")
    assert len(text) == room or stopped and len(text) < room
    assert not set(text[:-1]) & options["stop"]
    assert all(0 <= token < n_ids for token in text)

    written = 0
    for r in trace.rounds:
        assert r.start == len(prompt) + written and len(r.drafted) <= min(k, room - written - 1)
        assert not r.drafted or r.start + len(r.drafted) - 1 <= (drafter.context or context)  # what the drafter has read
        assert 0 <= r.accepted <= len(r.drafted) and all(0 <= token < n_ids for token in r.drafted)
        assert r.emitted[: r.accepted] == r.drafted[: len(r.emitted)][: r.accepted]
        assert len(r.emitted) == r.accepted + 1 or r.emitted[-1] in options["stop"]
        for rows, length in ((r.target_probs, len(r.drafted) + 1), (r.draft_probs, len(r.drafted))):
            assert rows.shape == (length, n_ids) and (rows >= 0).all()
            assert torch.allclose(rows.double().sum(-1), torch.ones(length, dtype=torch.float64))
        written += len(r.emitted)
    assert written == len(text)

    certain = options["sampling"].temperature == 0 or options["sampling"].top_k == 1
    if certain:
        alone = dict(max_new_tokens=n, sampling=Sampling(0), stop=options["stop"])
        assert text == list(generate(target, prompt, **alone))


@given(
    seed=st.integers(0, 2**31), n_ids=st.integers(3, 4), k=st.integers(1, 3), n=st.integers(1, 2), sampling=SAMPLINGS,
    rule=st.sampled_from(sorted(RULES)), prompt=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    drafter=st.sampled_from(["another", "itself", "lookup"]), stop=st.sets(st.integers(0, 2), max_size=1),
)  # fmt: skip
@settings(max_examples=40)
def test_the_joint_law_of_any_pair(proof, seed, n_ids, k, n, sampling, rule, prompt, drafter, stop):
    target, draft = small_pair(seed, vocab_size=n_ids + 1, n_ids=n_ids)
    made = {"another": DraftModel(draft), "itself": DraftModel(target), "lookup": PromptLookup(n_ids)}[drafter]
    exact = own_law(target, prompt, sampling, n, stop=stop)
    law = engine_law(target, made, prompt, sampling, k, n, rule=RULES[rule], stop=stop)
    proof.law("any models, settings, prompts and stop tokens", law, exact)


# Padding ids: rows of the output layer above the tokenizer's size


def padding_emitted(target, draft, n_ids, temperature):
    """How many of the ids that either arm drafts or emits lie at or above ``n_ids``, and how many there were."""
    ids, sampling = [], Sampling(temperature)
    for seed in range(4):
        trace = Trace()
        ids += generate(target, [1], max_new_tokens=20, sampling=sampling, randomness=Randomness(seed))
        for drafter in (DraftModel(draft), PromptLookup(target.config.n_ids)):
            options = dict(drafter=drafter, k=3, max_new_tokens=20, sampling=sampling, randomness=Randomness(seed), trace=trace)
            ids += speculate(target, [1], **options)
        ids += [token for r in trace.rounds for token in r.drafted]
    return sum(token >= n_ids for token in ids), len(ids)


def loud_padding(model, n_ids):
    """Make the padding ids the most probable ones, wherever they are looked at."""
    model.register_forward_hook(lambda _, __, logits: torch.cat([logits[..., :n_ids], logits[..., n_ids:] + 50], -1))
    return model


TEMPERATURES = (0.0, 1e-6, 1.0, 1.7, 1e6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_padding_ids_are_never_emitted(proof, temperature):
    for seed in range(3):
        target, draft = (loud_padding(m, 10) for m in small_pair(seed, vocab_size=16, n_ids=10, context=32))
        found, n = padding_emitted(target, draft, 10, temperature)
        proof.check("padding ids, untrained pair", "ids drafted or emitted", found, 0, n)
    blind = small_pair(0, vocab_size=16, n_ids=16, context=32)  # the same, with nobody told where padding begins
    found, n = padding_emitted(*(loud_padding(m, 10) for m in blind), 10, temperature)
    proof.control("padding ids looked at", "ids drafted or emitted", found, 0, n)


def test_padding_ids_are_never_emitted_by_a_trained_pair(proof, toy_data):
    """Training pushes them down; a high temperature would bring them back."""
    pair = []
    for layers, seed in ((2, 1), (1, 2)):
        config = ModelConfig(layers, 2, 16, 1, vocab_size=96, n_ids=64, context=32, dropout=0.0)
        model = Transformer(config, torch.Generator().manual_seed(seed))
        train(model, toy_data, Schedule((Phase(30, 5, 3e-3, 0.1, 1, 8, 30),), block_size=16, evaluation_batches=1))
        pair.append(model.eval())
    for temperature in TEMPERATURES:
        found, n = padding_emitted(*pair, 64, temperature)
        proof.check("padding ids, trained pair", "ids drafted or emitted", found, 0, n)
