import itertools

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafting import DraftModel, PromptLookup
from specdec.engine import Trace, generate, speculate
from specdec.inference import ready_rule
from specdec.sampling import RULES, Randomness, Sampling, token_wise

GREEDY = Sampling(0)


def texts(target, draft, prompt, k, **options):
    drafter = draft if isinstance(draft, PromptLookup) else DraftModel(draft)
    return list(speculate(target, prompt, drafter=drafter, k=k, **options))


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("rule", RULES)
def test_greedy_identity(proof, k, rule):
    """Float64, temperature 0: the same tokens as the target alone, with any drafter."""
    target = make_model(2, 16, 1, vocab_size=40, n_ids=37, context=64)
    expected = list(generate(target, [1, 2, 3], max_new_tokens=40, sampling=GREEDY))
    for draft in (make_model(1, 8, 2, vocab_size=40, n_ids=37, context=64), target, PromptLookup(37)):
        trace = Trace()
        options = dict(max_new_tokens=40, sampling=GREEDY, trace=trace, rule=RULES[rule])
        text = texts(target, draft, [1, 2, 3], k, **options)
        different = sum(a != b for a, b in zip(text, expected))
        proof.check("temperature 0 in float64, k = 1 to 8", "tokens that differ", different, 0, len(expected))
        assert text == expected == trace.tokens
        if draft is target:  # everything is accepted, so the passes are as few as they can be
            assert trace.target_passes == -(-40 // (k + 1))


@given(
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=10), n=st.integers(0, 20), k=st.integers(1, 9),
    T=st.sampled_from([0.0, 0.7, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_lengths_counts_and_the_context_limit(prompt, n, k, T, seed):
    target, draft, trace = make_model(2, 16, 1), make_model(1, 8, 2), Trace()
    out = texts(target, draft, prompt, k, max_new_tokens=n, sampling=Sampling(T), randomness=Randomness(seed), trace=trace)
    room = min(n, 16 - len(prompt))
    assert len(out) == room and trace.tokens == out
    assert trace.finish == ("length" if len(prompt) + n <= 16 else "context")
    assert [t for r in trace.rounds for t in r.emitted] == out
    assert all(0 <= r.accepted <= len(r.drafted) <= k and len(r.emitted) == r.accepted + 1 for r in trace.rounds)
    assert all(t < 5 for t in out)  # ids 5, 6 and 7 are padding
    if T == 0:
        assert out == list(generate(target, prompt, max_new_tokens=n, sampling=Sampling(0)))


def test_equal_seeds_equal_texts_on_the_stream_and_in_one_go(pair):
    options = dict(max_new_tokens=12, sampling=Sampling(1.0))
    whole = [texts(*pair, [1], 3, randomness=Randomness(s), **options) for s in range(8)]
    streamed = []
    for s in range(8):
        stream, text = speculate(pair[0], [1], drafter=DraftModel(pair[1]), k=3, randomness=Randomness(s), **options), []
        for token in stream:
            torch.rand(3)  # what the reader does in between changes nothing
            text.append(token)
        streamed.append(text)
    assert whole == streamed and len(set(map(tuple, whole))) > 1
    alone = [list(generate(pair[0], [1], randomness=Randomness(s), **options)) for s in (3, 3)]
    assert alone[0] == alone[1]


def test_a_drafter_can_be_used_again(pair):
    drafter = DraftModel(pair[1])
    options = dict(drafter=drafter, k=3, max_new_tokens=9, sampling=GREEDY)
    first = list(speculate(pair[0], [1, 2], **options))
    list(speculate(pair[0], [4], **options))
    assert list(speculate(pair[0], [1, 2], **options)) == first


def test_a_stop_token_inside_a_block_ends_the_text_there():
    target = make_model(2, 16, 1, vocab_size=40, n_ids=37, context=64)
    expected = list(generate(target, [1, 2, 3], max_new_tokens=40, sampling=GREEDY))
    for stop in set(expected[:12]):
        cut = expected[: expected.index(stop) + 1]
        for k in (1, 3, 8):
            trace = Trace()  # the target as its own draft: the stop token lies inside an accepted block
            out = texts(target, target, [1, 2, 3], k, max_new_tokens=40, sampling=GREEDY, stop=(stop,), trace=trace)
            assert out == cut and trace.finish == "stop"
        trace = Trace()
        assert list(generate(target, [1, 2, 3], max_new_tokens=40, sampling=GREEDY, stop=(stop,), trace=trace)) == cut
        assert trace.finish == "stop"


def test_a_trace_counts_and_adds_up(pair):
    """With a clock that says 0, 1, 2, …, every mark charges one."""
    target, draft = pair
    alone, both = (Trace(clock=itertools.count().__next__) for _ in range(2))
    stream = generate(target, [1, 2, 3], max_new_tokens=9, trace=alone)
    text = []
    for token in stream:
        text.append(token)
        assert alone.tokens == text and alone.target_passes == len(text) and alone.finish is None
    assert (alone.prompt, alone.rounds, alone.finish) == ([1, 2, 3], [], "length")
    assert alone.seconds == {"prefill": 1, "decode": 9}
    text = texts(target, draft, [1, 2, 3], 2, max_new_tokens=9, trace=both)
    assert both.tokens == text == [token for r in both.rounds for token in r.emitted] and both.target_passes == len(both.rounds)
    assert both.seconds.pop("prefill") == 1 and set(both.seconds.values()) == {len(both.rounds)}
    assert [r.start for r in both.rounds] == [3 + sum(len(r.emitted) for r in both.rounds[:i]) for i in range(len(both.rounds))]


def test_prompt_lookup_copies_what_followed():
    lookup = PromptLookup(10, longest=2)
    draft = lookup.propose([1, 2, 3, 4, 1, 2], 3, GREEDY, None)
    assert draft.tokens.tolist() == [3, 4, 1] and torch.equal(draft.probs.argmax(-1), draft.tokens)
    assert lookup.propose([1, 2, 3], 3, GREEDY, None).tokens.tolist() == []
    assert PromptLookup(10).propose([7, 7], 4, GREEDY, None).tokens.tolist() == [7]
    with pytest.raises(ValueError, match="cannot be looked up"):
        PromptLookup(10, longest=1, shortest=2)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_a_prompt_may_be_a_slice_of_the_data(pair, kind):
    prompt = [1, 2, 3] if kind is tuple else kind([1, 2, 3], dtype=getattr(np if kind is np.array else torch, "uint16"))
    options, traces = dict(max_new_tokens=5, sampling=GREEDY), (Trace(), Trace())
    alone, both = generate(pair[0], prompt, trace=traces[0], **options), texts(*pair, prompt, 2, trace=traces[1], **options)
    assert list(alone) == both == list(generate(pair[0], [1, 2, 3], **options))
    assert all(t.prompt == [1, 2, 3] and type(t.prompt[0]) is int for t in traces)


def bad_calls(target, draft):
    other = make_model(1, 8, 2, vocab_size=8, n_ids=4)
    good = dict(drafter=DraftModel(draft), k=2, max_new_tokens=4)
    yield "prompt is empty", [], good
    yield "shorten the prompt", [1] * 17, good
    yield "outside", [5], good  # a padding id
    yield "outside", [-1], good
    yield "k is 0", [1], good | {"k": 0}
    yield "max_new_tokens", [1], good | {"max_new_tokens": -1}
    yield "use one tokenizer", [1], good | {"drafter": DraftModel(other)}
    for prompt in ("The people", [1.7], ["1"]):
        yield "no list of ids", prompt, good


def test_bad_input_gets_a_sentence(pair):
    for message, prompt, options in bad_calls(*pair):
        with pytest.raises(ValueError, match=message):
            list(speculate(pair[0], prompt, **options))


BAD_PROPOSALS = {
    "fewer tokens than rows": lambda tokens, probs: (tokens[:1], probs),
    "fewer rows than tokens": lambda tokens, probs: (tokens, probs[:1]),
    "more than was asked for": lambda tokens, probs: (tokens.repeat(2), probs.repeat(2, 1)),
    "rows over other ids": lambda tokens, probs: (tokens, probs[:, :4]),
    "one row for all": lambda tokens, probs: (tokens, probs[0]),
    "tokens in a row": lambda tokens, probs: (tokens[:, None], probs),
}


@pytest.mark.parametrize("name", BAD_PROPOSALS)
@pytest.mark.parametrize("rule", [token_wise, ready_rule(token_wise, "compiled")])
def test_a_proposal_of_the_wrong_shape_is_refused(pair, name, rule):
    """Judged all the same it would bend the law, or have rows read that are not there."""

    class Careless(DraftModel):
        def propose(self, *asked):
            return BAD_PROPOSALS[name](*super().propose(*asked))

    with pytest.raises(ValueError, match="the drafter was asked for at most 2 tokens and proposed"):
        list(speculate(pair[0], [1, 2], drafter=Careless(pair[1]), k=2, max_new_tokens=8, rule=rule))


@pytest.mark.parametrize("culprit", ["target", "draft model"])
def test_a_model_that_breaks_is_named(pair, culprit):
    model = pair[culprit == "draft model"]
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"the {culprit} produced"):
        texts(*pair, [1], 2, max_new_tokens=4)


def test_a_prompt_that_fills_the_context_yields_nothing(pair):
    trace = Trace()
    assert texts(*pair, [1] * 16, 2, max_new_tokens=3, trace=trace) == [] and trace.finish == "context"
