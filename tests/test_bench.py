from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model

from specdec import bench, prediction, theory
from specdec.data import held_out_prompts
from specdec.drafting import DraftModel, frequent_ids
from specdec.engine import Round, Trace, generate, speculate
from specdec.profiles import PROFILES, BenchConfig
from specdec.sampling import Randomness, Sampling

CONFIG = BenchConfig(n_prompts=2, prompt_tokens=2, new_tokens=8, ks=(1, 2), n_sweep_prompts=1)


def rows(**arms):
    return [{"arm": a, "prompt": i, "seconds": s, "tokens": n} for a, cells in arms.items() for i, (s, n) in enumerate(cells)]


def test_ratio_is_one_of_totals():
    table = rows(new=[(1.0, 8), (4.0, 8)], old=[(4.0, 8), (1.0, 8)])
    assert bench.speed_ratio(table, "new", "old")["value"] == pytest.approx(1.0)
    assert bench.speed_ratio(table, "old", "old")["ci95"] == [1.0, 1.0]


def test_a_line_of_the_table_is_made_of_totals():
    counts = {"target_passes": 4, "distinct_tokens": 5, "rounds": 4, "drafted": 16, "examined": 12, "accepted": 6}
    seconds = {"C": (1.0, 3.0), "A": (6.0, 2.0)}
    table = [{"arm": arm, "prompt": i, "seconds": seconds[arm][i], "tokens": 10} | counts for arm in seconds for i in (0, 1)]
    line = bench.cell(table, "C", "A")
    assert line["tokens_per_second"] == 20 / 4 and line["speedup"] == pytest.approx(2.0)
    assert [line["ci95_low"], line["ci95_high"]] == bench.speed_ratio(table, "C", "A")["ci95"] == pytest.approx([2 / 3, 6.0])
    assert line["tokens_per_target_pass"] == 20 / 8 and line["distinct_fraction"] == 10 / 20
    assert (line["tokens_per_round"], line["accepted_per_examined"], line["accepted_per_drafted"]) == (20 / 8, 12 / 24, 12 / 32)
    assert bench.acceptance(table, "C") == {"value": 0.5, "ci95": [0.5, 0.5]}
    table[0] |= {"examined": 6}  # of the two prompts of C one keeps all, the other half
    assert bench.acceptance(table, "C") == {"value": 12 / 18, "ci95": [0.5, 1.0]}
    table[0] |= {"rounds": 0}
    table[1] |= {"rounds": 0}
    assert "tokens_per_round" not in bench.cell(table, "C", "A")  # as of a target alone


def test_the_interval_holds_the_value_and_shrinks_with_prompts():
    generator = torch.Generator().manual_seed(0)

    def width(n):
        noise = (0.5 + torch.rand(n, generator=generator)).tolist()
        ratio = bench.speed_ratio(rows(new=[(x, 10) for x in noise], old=[(2.0, 10)] * n), "new", "old")
        assert ratio["ci95"][0] <= ratio["value"] <= ratio["ci95"][1]
        return ratio["ci95"][1] - ratio["ci95"][0]

    assert width(200) < width(10)


def test_documents_are_drawn_anew_where_rows_name_them():
    """Ten prompts of five documents, all of one document alike: as sure as five, not as ten."""
    seconds = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0]
    table = rows(new=[(s, 10) for s in seconds], old=[(2.0, 10)] * 10)
    named = [row | {"document": 7 + row["prompt"] // 2} for row in table]
    once = rows(new=[(s, 10) for s in seconds[::2]], old=[(2.0, 10)] * 5)
    alone, apart, few = (bench.speed_ratio(t, "new", "old") for t in (table, named, once))
    assert alone["value"] == apart["value"] == few["value"] and apart["ci95"] == few["ci95"]
    assert apart["ci95"][0] < alone["ci95"][0] and apart["ci95"][1] > alone["ci95"][1]
    four = [row | {"document": row["prompt"] // 3} for row in table]
    assert bench.speed_ratio(four, "new", "old") == alone  # too few to draw from
    counts = [row | {"accepted": row["seconds"], "examined": 5} for row in named]
    assert bench.acceptance(counts, "new")["value"] == 0.6
    unequal = [row | {"document": min(row["prompt"], 5)} for row in counts]  # a document's prompts count together
    assert bench.acceptance(unequal, "new")["value"] == 0.6


def test_rows_say_where_a_prompt_is_from(toy_data):
    prompts = bench.split_prompts(toy_data, replace(CONFIG, n_prompts=3)).fresh
    table = bench.measure({"A": lambda prompt, randomness, trace: None}, [*prompts, [1, 2]], seed=0)
    assert [row["document"] for row in table] == [*(p.document for p in prompts), 3]
    both = [row | {"arm": f"A beside {name}"} for row in table for name in "xy"]
    assert [(row["prompt"], row["document"]) for row in bench.together(both, "A")] == [(r["prompt"], r["document"]) for r in table]


def test_every_arm_runs_every_prompt_in_rotated_order():
    order, traces = [], {}
    arms = {name: (lambda prompt, randomness, trace, name=name: (order.append((name, prompt[0])), trace.tokens.extend(prompt)))
            for name in "abc"}  # fmt: skip
    table = bench.measure(arms, [[0], [1], [2]], seed=0, warmup=1, traces=traces)
    assert {name: [trace.tokens for trace in of] for name, of in traces.items()} == dict.fromkeys("abc", [[0], [1], [2]])
    assert len(order) == 12 and len(table) == 9  # the warm-up is not in the table
    assert [name for name, p in order if p == 1] == ["b", "c", "a"]
    assert {(r["arm"], r["prompt"]) for r in table} == {(a, i) for a in "abc" for i in range(3)}


def test_counts_of_a_trace():
    trace = Trace(tokens=[1, 2, 3, 4, 5], target_passes=2)
    trace.rounds = [Round(0, [1, 2, 9], 2, [1, 2, 3]), Round(3, [4, 9, 9], 1, [4, 5])]
    counts = bench.summary([trace])
    assert (counts["drafted"], counts["examined"], counts["accepted"], counts["rounds"]) == (6, 5, 3, 2)
    assert bench.acceptance_by_position([trace], 3) == [1.0, 0.5, 0.0]
    trace.rounds[1].drafted.pop()  # a round cut short says nothing about the places that it did not reach
    assert bench.acceptance_by_position([trace], 3) == [1.0, 0.5, 0.0]
    assert np.isnan(bench.acceptance_by_position([trace], 4)[3])  # the fourth was never drafted, which is not a refusal
    assert np.isnan(bench.acceptance_by_position([trace], 3, fewest=2)).tolist() == [False, False, True]
    assert theory.tokens_per_round([1.0, 0.5, 0.0]) == pytest.approx(counts["tokens"] / counts["rounds"])


def test_alpha_is_the_mean_overlap_where_the_rule_looked():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    trace = Trace(rounds=[Round(0, [0, 1], 1, [0, 0], p, q), Round(2, [0, 1], 0, [1], p, q)])
    assert bench.alpha([trace]) == pytest.approx((1 + 0.25 + 1) / 3)


def test_identical_models_accept_everything(pair):
    target, _ = pair
    trace = Trace(keep_probs=True)
    bench.both(target, DraftModel(target), 2, CONFIG, Sampling())([1, 2], Randomness(0), trace)
    assert bench.alpha([trace]) == pytest.approx(1.0)
    assert bench.summary([trace])["accepted"] == bench.summary([trace])["drafted"]


class TestGreedyTies:
    def test_nothing_parts_in_float64(self):
        target, draft = make_model(2, 16, 1), make_model(1, 8, 2)
        ties = bench.greedy_ties(target, DraftModel(draft), [[1], [2, 3]], k=3, new_tokens=12)
        assert (ties.tokens, ties.texts, ties.parted, ties.near) == (24, 2, 0, 0) and ties.floor < 1e-10

    def test_a_pass_that_computes_something_else_is_seen(self):
        target, draft = make_model(2, 16, 1), make_model(1, 8, 2)

        class Noisy:
            """Several rows together come out differently."""

            config, device, new_cache = target.config, target.device, target.new_cache

            def __call__(self, ids, cache):
                return target(ids, cache) * (1 if ids.shape[1] == 1 else -1)

        ties = bench.greedy_ties(Noisy(), DraftModel(draft), [[1], [2]], k=3, new_tokens=12)
        assert ties.parted == 2 and ties.floor > 1 and 0 < ties.largest < ties.floor

        prompt, options = [2, 3], {"max_new_tokens": 12, "sampling": Sampling(0)}  # the same by a single pass over the text
        own = list(generate(target, prompt, **options))
        other = list(speculate(Noisy(), prompt, drafter=DraftModel(draft), k=3, **options))
        margins = target(torch.tensor([prompt + own[:-1]])).detach()[0, 1:, :5].topk(2).values.diff()[:, 0].neg()
        parted = next(i for i, (a, b) in enumerate(zip(own, other)) if a != b)
        ties = bench.greedy_ties(Noisy(), DraftModel(draft), [prompt], k=3, new_tokens=12)
        assert ties.largest == pytest.approx(float(margins[parted])) and ties.floor == pytest.approx(4 * float(margins.max()))
        assert ties.near == sum(m < ties.floor for m in margins.tolist()) == 12


@pytest.mark.parametrize("passes", ["eager", "graphs"])
def test_drafters_offer_as_many_ids_as_the_settings_say(toy_data, passes):
    shape = dict(vocab_size=257, n_ids=257, context=64)
    models = {"target": make_model(2, 16, 1, **shape), "small": make_model(1, 8, 2, **shape)}
    config = replace(CONFIG, dtype="float64", passes=passes, draft_ids=10)
    target, drafters, alone = bench.equip(models, config, toy_data)
    trace = Trace()
    list(speculate(target, [1, 2], drafter=drafters["small"], k=2, max_new_tokens=40, trace=trace))
    assert {x for r in trace.rounds for x in r.drafted} <= set(frequent_ids(toy_data, 10).tolist())
    assert alone["small"](torch.tensor([[1]]), alone["small"].new_cache()).shape[-1] == 257  # arm B is the whole model


def test_a_baseline_in_several_moments_is_one():
    rows = [{"arm": arm, "prompt": i, "seconds": s, "tokens": 8} for i in (0, 1) for arm, s in (("A beside x", 1.0), ("A beside y", 3.0), ("C", 1.0))]
    merged = bench.together(rows, "A")
    assert [(r["arm"], r["prompt"], r["seconds"], r["tokens"]) for r in merged[:2]] == [("A", 0, 4.0, 16), ("A", 1, 4.0, 16)]
    assert [r["arm"] for r in merged[2:]] == ["C", "C"] and bench.speed_ratio(merged, "C", "A")["value"] == pytest.approx(2.0)


@pytest.mark.parametrize("stolen, runs", [([0, 0], 1), ([0, 1, 1, 1], 2), ([0, 1, 2, 3, 4, 5], 3)])
def test_a_text_whose_processor_was_taken_away_is_run_again(monkeypatch, stolen, runs):
    ticks, ran = iter(stolen), []
    monkeypatch.setattr(bench, "stolen", lambda: next(ticks))
    rows = bench.measure({"A": lambda prompt, randomness, trace: ran.append(prompt)}, [[1]], seed=0, warmup=0)
    assert len(ran) == runs and [row["runs"] for row in rows] == [runs]


def test_where_processors_are_always_taken_away_few_texts_are_run_again(monkeypatch):
    ticks, ran = iter(range(10**6)), []
    monkeypatch.setattr(bench, "stolen", lambda: next(ticks))
    arms = {name: (lambda prompt, randomness, trace: ran.append(prompt)) for name in "AB"}
    bench.measure(arms, [[1]] * 40, seed=0, warmup=0)
    assert len(ran) == 80 + 8


def test_stolen_time_is_read_where_it_is_counted(tmp_path):
    (tmp_path / "new").write_text("cpu  10 20 30 40 50 60 70 88 90 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n")
    (tmp_path / "old").write_text("cpu  10 20 30 40\n")  # as systems did that knew of no other machine
    assert [bench.stolen(tmp_path / name) for name in ("new", "old", "none")] == [88, 0, 0]


def test_no_prompt_is_in_two_lists(toy_data):
    config = replace(CONFIG, n_prompts=5, n_sweep_prompts=2, n_untimed_prompts=3)
    prompts = bench.split_prompts(toy_data, config)
    assert [len(these) for these in prompts] == [2, 3, 5] and len({tuple(p) for these in prompts for p in these}) == 10
    every = [tuple(p) for p in held_out_prompts(toy_data, 10, config.prompt_tokens)]
    for these in prompts:  # none of them from one end of the text
        places = [every.index(tuple(p)) for p in these]
        assert min(places) < 4 and max(places) >= 5
    assert bench.split_prompts(toy_data, CONFIG).untimed == []


@pytest.mark.parametrize("profile", ["cpu", "seed"])
def test_every_list_reaches_over_all_of_the_text(toy_data, profile):
    config, every = replace(PROFILES[profile].bench, prompt_tokens=12), held_out_prompts(toy_data, 989, 12)
    places = {tuple(p): i for i, p in enumerate(every)}
    assert len(places) == len(every)
    for these in bench.split_prompts(toy_data, config):
        mine = sorted(places[tuple(p)] for p in these)
        assert mine[0] < 0.1 * len(every) and mine[-1] > 0.9 * len(every), (len(these), mine)


def test_texts_that_are_not_timed_count_in_the_choice_of_k(toy_data, monkeypatch):
    """One of the sweep, in which all drafts are refused, and three others, in which all are kept."""
    kept = Trace(prompt=[7], tokens=[1] * 12, rounds=[Round(1, [1] * 5, 5, [1] * 6), Round(7, [1] * 5, 5, [1] * 6)])
    probs = torch.ones(6, 1)
    refused = Trace(prompt=[7], tokens=[1], rounds=[Round(1, [0] * 5, 0, [0], probs, probs[:5])])
    monkeypatch.setattr(prediction, "acceptance_of_wanted", lambda by_k: ([float(by_k.get(5, [None])[0] is kept)] * 5, [5]))
    monkeypatch.setattr(theory, "text_cost", lambda n, alphas, k, draft, verdict: n / k if alphas[0] else n * k / 9)
    shape = dict(vocab_size=257, n_ids=257, context=64)
    models = {"target": make_model(2, 16, 1, **shape), "small": make_model(1, 8, 2, **shape)}
    for n_untimed, picked in ((0, 1), (3, 5)):
        config = replace(CONFIG, ks=(1, 2, 5), temperatures=(0.0,), dtype="float64", n_untimed_prompts=n_untimed)
        texts = lambda self, name, prompts, keep_probs=False, n=n_untimed: [refused] if keep_probs else [kept] * n  # noqa: E731
        monkeypatch.setattr(bench._Temperature, "untimed", texts)
        result = bench.run(*bench.equip(models, config, toy_data), toy_data, config)
        assert result.best_k["small T=0"]["picked"] == picked and result.best["small T=0"]["arm"] == f"C small k={picked}"
        of_sweep = [line["predicted"] for line in result.cells if "predicted" in line]
        assert of_sweep == sorted(of_sweep, reverse=True)  # there only its own texts count


def test_the_k_of_the_final_figures_is_the_one_that_theory_picks(toy_data, monkeypatch):
    """Theory says that a long draft costs nothing, whatever was measured."""
    shape = dict(vocab_size=257, n_ids=257, context=64)
    models = {"target": make_model(2, 16, 1, **shape), "small": make_model(1, 8, 2, **shape)}
    config = replace(CONFIG, ks=(1, 2, 5), temperatures=(1.0,), dtype="float64")
    monkeypatch.setattr(theory, "text_cost", lambda n, alphas, k, draft, verdict: n / k)
    result = bench.run(*bench.equip(models, config, toy_data), toy_data, config)
    assert result.best["small T=1"]["arm"] == "C small k=5" and result.best_k["small T=1"]["picked"] == 5
    fresh = [r for r in result.rows if r["part"] == "final"]
    assert {r["arm"] for r in fresh} >= {"A", "A again", "B small", "C small k=5"}
    assert result.best["target T=1"]["arm"] == "A" and result.best["small T=1"]["draft_alone"] == bench.cell(
        [{key: value for key, value in r.items() if key not in ("temperature", "part")} for r in fresh], "B small", "A"
    )
    speed = {line["k"]: line["speedup"] for line in result.cells if "predicted" in line}
    assert result.best_k["small T=1"]["of_best"] == pytest.approx(speed[5] / max(speed.values()))
    assert result.sweep_errors["n"] == 3 and result.fresh_errors["n"] == 1


@pytest.mark.parametrize("power", [-9, 9])
def test_the_block_rule_is_run_beside_the_other(toy_data, monkeypatch, power):
    """At the k where its expected tokens, for what they cost, are the most; at temperature 0 there is nothing to compare."""
    monkeypatch.setattr(prediction, "tokens_as_block", lambda traces, k: k**power)
    shape = dict(vocab_size=257, n_ids=257, context=64)
    models = {"target": make_model(2, 16, 1, **shape), "small": make_model(1, 8, 2, **shape)}
    config = replace(CONFIG, dtype="float64")
    result = bench.run(*bench.equip(models, config, toy_data), toy_data, config)
    assert set(result.as_block) == {"small T=1"}
    line, arms = result.as_block["small T=1"], {r["arm"] for r in result.rows if r["part"] == "final"}
    assert line["k"] == (1 if power < 0 else 2) and line["tokens_per_round_expected"] == line["k"] ** power
    assert line["arm"] == f"C small block k={line['k']}" and line["arm"] in arms and line["of_token_wise"]["value"] > 0
