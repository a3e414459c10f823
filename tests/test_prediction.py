import pytest
import torch
from conftest import make_model

from specdec import bench, prediction, theory
from specdec.drafting import DraftModel
from specdec.engine import Round, Trace, speculate
from specdec.profiles import BenchConfig
from specdec.sampling import Randomness, Sampling, block, token_wise

CONFIG = BenchConfig(n_prompts=2, prompt_tokens=2, new_tokens=8, ks=(1, 2), n_sweep_prompts=1)


def test_a_wanted_draft_that_is_not_there_counts_as_refused():
    trace = Trace(prompt=[7], tokens=[1, 2, 3, 4, 5, 6])
    trace.rounds = [Round(1, [1], 1, [1, 2]), Round(3, [3, 4], 2, [3, 4, 5]), Round(6, [], 0, [6])]
    alphas, lengths = prediction.acceptance_of_wanted({2: [trace]})
    assert alphas == [1.0, 0.5]  # the first round offered one of two; the last one had no room for any
    assert lengths == [1, 2]
    costs = prediction.Costs(1.0, {1: 0.0}, {1: 1.0, 2: 1.2, 3: 1.6}, 0.1)
    assert prediction.mean_verdict(costs, lengths, 3) == pytest.approx(1.4 + 0.1)
    assert prediction.mean_verdict(costs, lengths, 2) == pytest.approx(1.2 + 0.1)
    assert prediction.mean_verdict(costs, [0, 1], 3) == pytest.approx((1.0 + 1.2 + 0.1) / 2)  # no draft, nothing to decide


def test_the_first_draft_of_a_round_may_cost_more():
    costs = prediction.Costs(1.0, {1: 0.3, 3: 0.5}, {1: 1.0}, 0.0)
    assert [costs.draft(k) for k in range(4)] == pytest.approx([0, 0.3, 0.4, 0.5]) and costs.c == pytest.approx(0.5 / 3)
    assert theory.round_cost(2, costs.draft, 1.2, 0.1) == pytest.approx(0.4 + 1.2 + 0.1)


def test_the_prediction_of_a_model_that_always_drafts_is_the_plain_one(pair):
    traces = {}
    for k in (1, 3):
        traces[k] = [Trace() for _ in range(6)]
        for seed, trace in enumerate(traces[k]):
            bench.both(pair[0], DraftModel(pair[1]), k, CONFIG, Sampling())([1, 2], Randomness(seed), trace)
    alphas, lengths = prediction.acceptance_of_wanted(traces)
    assert alphas == bench.acceptance_by_position(traces[1] + traces[3], 3) and set(lengths) == {3}


def test_costs_are_positive_and_caches_are_left_alone(pair):
    timings = prediction.time_parts(pair[0], DraftModel(pair[1]), [1, 2, 3], Sampling(), ks=(1, 2, 3), repeats=1)
    costs = prediction.costs_of(timings)
    assert costs.c > 0 and costs.o > 0 and set(costs.drafts) == {1, 2, 3} and set(costs.v) == {1, 2, 3, 4}
    assert min(*costs.drafts.values(), *costs.v.values()) > 0
    assert costs.verify(2) == pytest.approx(costs.v[2])


def test_passes_are_timed_over_the_rows_that_they_are_named_for(pair):
    rows = []
    pair[0].register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    prediction.time_parts(pair[0], DraftModel(pair[1]), [1, 2, 3, 4, 1, 2], Sampling(), ks=(1, 3), repeats=1)
    assert rows[0] == 6 and set(rows[1:]) == {1, 2, 4}  # the prompt, a step of the target alone, and k + 1


def test_the_decision_is_timed_for_the_middle_k(pair):
    timings = prediction.time_parts(pair[0], DraftModel(pair[1]), [1, 2, 3], Sampling(), ks=(7, 1, 2, 3, 5), repeats=1)
    assert [k for part, k in timings if part == "decide"] == [3]


def test_a_prediction_is_of_the_whole_text():
    """Two tokens, of which the draft of one is refused: a round, and a step without a draft. The prompt counts in both."""
    costs = prediction.Costs(2.0, {1: 0.25}, {1: 1.0, 2: 1.5}, 0.125)
    found = prediction.predict(costs, [([0.0], [1])], k=1, n=2, prefill_seconds=6.0)
    assert found == pytest.approx((3 + 2) / (3 + 0.25 + 1.5 + 0.125 + 1.0))
    both = prediction.predict(costs, [([0.0], [1]), ([1.0], [1])], k=1, n=2, prefill_seconds=6.0)  # the mean is of times, not of speeds
    assert both == pytest.approx((3 + 2) / (3 + (0.25 + 1.5 + 0.125 + 1.0 + 0.25 + 1.5 + 0.125) / 2))


def test_the_block_rule_gets_the_k_that_pays(monkeypatch):
    """Every draft is kept, and three rows cost what one does, but four fifty times that."""
    monkeypatch.setattr(prediction, "tokens_as_block", lambda kept, k: k + 1.0)
    costs = prediction.Costs(1.0, {1: 0.1, 3: 0.3}, {1: 1.0, 3: 1.0, 4: 50.0}, 0.0)
    assert prediction.best_as_block([], costs, [([], [3])], (1, 2, 3)) == (2, 3.0)
    dear = prediction.Costs(1.0, {1: 1.0, 3: 50.0}, {1: 1.0, 4: 1.0}, 0.0)
    assert prediction.best_as_block([], dear, [([], [3])], (1, 2, 3)) == (1, 2.0)


def test_what_stopping_gains_at_most_is_the_best_threshold_over_the_best_fixed_k():
    sure, flat, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    rounds = [Round(1, [0, 0, 0], 3, [0] * 4, torch.stack([p] * 4), torch.stack([sure] * 3)) for p in (sure, wrong)]
    costs = prediction.Costs(1.0, {1: 0.1, 3: 0.3}, {1: 1.0, 4: 1.0}, 0.0)
    traces = [Trace(rounds=rounds + [Round(9, [0], 0, [1], flat[None], sure[None])])]  # the last has no room for three
    best = prediction.gain_of_stopping(traces, costs, theory.overlap)  # three drafts where all stay and one where none does
    assert best == pytest.approx((2.5 / 1.2) / (2.5 / 1.3) - 1)
    assert prediction.gain_of_stopping(traces, costs, lambda p, q: torch.full((3,), 0.9)) == pytest.approx(0)  # as a fixed k
    assert prediction.gain_of_stopping(traces, costs, lambda p, q: 1 - theory.overlap(p, q)) < 0  # a sign that misleads


def test_agreement_is_relative_and_counts_intervals():
    lines = [{"predicted": p, "speedup": s, "ci95_low": s - 0.2, "ci95_high": s + 0.2} for p, s in ((2.2, 2.0), (4.0, 5.0), (1.1, 1.0))]
    found = prediction.agreement(lines)
    assert found["mean_error"] == pytest.approx((0.1 - 0.2 + 0.1) / 3) and (found["within"], found["n"]) == (2, 3)
    assert found["r2"] == prediction.r_squared([2.0, 5.0, 1.0], [2.2, 4.0, 1.1])
    for edge in ("ci95_low", "ci95_high"):
        assert prediction.agreement([lines[0] | {"predicted": lines[0][edge]}])["within"] == 1


def test_r_squared_is_of_the_prediction_itself():
    assert prediction.r_squared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert prediction.r_squared([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) < 0  # perfectly correlated, and wrong


def test_tokens_of_the_block_rule_are_expected_from_drafts_of_any_text():
    """What a run by the block rule really emits, from the rounds of a run by the other, which emits fewer."""
    target, draft, found = make_model(2, 16, 1, context=1024), make_model(1, 8, 2, context=1024), {}
    options = {"k": 5, "max_new_tokens": 1000, "sampling": Sampling()}
    for rule in (token_wise, block):
        trace = Trace(keep_probs=True)
        list(speculate(target, [1], drafter=DraftModel(draft), rule=rule, randomness=Randomness(3), trace=trace, **options))
        found[rule] = prediction.tokens_as_block([trace], 5), len(trace.tokens) / len(trace.rounds)
    expected, emitted = found[token_wise][0], {rule: tokens for rule, (_, tokens) in found.items()}
    assert expected == pytest.approx(emitted[block], rel=0.03) and expected > 1.05 * emitted[token_wise]
    assert prediction.tokens_as_block([trace], 1) < prediction.tokens_as_block([trace], 2) < found[block][0]
