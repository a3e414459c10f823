"""The README says what is in results/, what is not there yet, and where speculation loses."""

import json

import pytest

from specdec import readme, report


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path))
    return tmp_path


def test_the_headline_has_every_profile_and_what_to_know_of_it():
    assert readme.headline().count("not measured yet") == 2
    cell = {"value": 2.0, "ci95": [1.9, 2.1], "k": 4}
    origin = {"machine": "a processor, an accelerator"}
    report.update_headline("seed", origin, speedup={"T0": cell, "T1": cell | {"value": 1.5}}, aa={"T0": cell | {"value": 1.01}, "T1": cell},
                           tokens_per_second={"A": 10, "B": 9000, "C": 15})  # fmt: skip
    report.record("seed", "training", params={}, values={"target": {"weights": 150e6}, "small": {"weights": 27.1e6}})
    cells = [{"draft": "small", "temperature": 1.0, "k": 4, "speedup": 1.5}, {"draft": "small", "temperature": 1.0, "k": 8, "speedup": 0.9}]
    report.record("seed", "benchmark_cells", params={}, values={}, rows=cells)
    report.record("seed", "benchmark", params={}, values={"best": {}})
    text = readme.headline()
    assert "| `cpu` | | not measured yet | | |" in text
    assert "| `seed`, an accelerator | as trained | **2.00×** [1.90, 2.10], k = 4 | **1.50×** [1.90, 2.10], k = 4 | not measured yet |" in text
    assert "a target of 150.0M weights and a draft of 27.1M: at T = 1 the target alone writes 10 tokens a second" in text
    assert "alone 9,000, both together 15." in text and "is 1.010 [1.900, 2.100] at T = 0" in text
    assert "loses in 1 of 2 cells" in text and "more processes" not in text
    rows = [
        {"run": i, "draft": draft, "temperature": 1.0, "rule": rule, "speedup": s + off, "target_alone": 10 / s}
        for i, s in enumerate((1.7, 1.9, 1.75)) for draft, rule, off in (("small distilled", "block", 0), ("small", "token-wise", -1))
    ]  # fmt: skip
    report.record("seed", "runs", params={"decoded_in": "float32"}, values={}, rows=rows)
    where = f"on {report.machine().split(', ')[-1]} with models trained there, in float32"
    text = readme.headline()
    assert f"| | in 3 more processes {where}: median (range) | — | — | 1.75× (1.70 – 1.90) |" in text
    assert f"| | in 3 more processes {where}: median (range) | — | 0.75× (0.70 – 0.90) | — |" in text
    assert "was 1.90 times as fast in the one where the target alone wrote least, 5 tokens a second, and 1.70 times where" in text
    same = report.load("seed", "runs")["provenance"]
    report.update_headline("seed", same | {"bf16": not same["bf16"]})
    assert where in readme.headline()
    report.update_headline("seed", same)
    assert "| | in 3 more processes: median (range) |" in readme.headline()
    report.update_headline("seed", same | {"commit": "0123456789ab"})
    assert f"| | in 3 more processes at commit {same['commit']}" in readme.headline()


def test_the_headline_has_the_first_machine_too():
    report.update_headline("cpu", {"machine": "a processor"})
    report.record("cpu", "benchmark", params={}, values={"best": {}})
    assert "a first one" not in readme.headline()
    line = {"speedup": 1.5, "ci95_low": 1.4, "ci95_high": 1.6, "k": 3}
    best = {f"{draft} T={t}": line | {"k": 3 + t} for draft in ("small", "small distilled") for t in (0, 1)}
    report.record("cpu", "benchmark_distilled_first_machine", params={"remark": "a first one"},
                  values={"best": best, "as_block": {key: cell | {"speedup": 1.45} for key, cell in best.items()}})  # fmt: skip
    text = readme.headline()
    assert text.count("| | a first one, commit ") == 2
    assert text.count("| 1.50× [1.40, 1.60], k = 3 | 1.50× [1.40, 1.60], k = 4 | 1.45× [1.40, 1.60], k = 4 |") == 2


def test_the_readme_block_says_what_is_missing_and_prints_what_loses(results):
    assert readme.numbers().count("Not measured yet") == 2
    report.update_headline("cpu", speedup={"T0": {"value": 2.0, "ci95": [1.9, 2.1], "k": 4}, "T1": report.HEADLINE["speedup"]["T1"]})
    cells = [{"draft": "small", "temperature": 0.0, "k": 4, "speedup": 2.0}, {"draft": "medium", "temperature": 1.0, "k": 8, "speedup": 0.7}]
    report.record("cpu", "benchmark_cells", params={}, values={}, rows=cells)
    best = {"small T=0": {"k": 4, "speedup": 1.9}, "lookup T=1": {"k": 2, "speedup": 0.8}, "target T=1": {"speedup": 1.0}}
    report.record("cpu", "benchmark", params={}, values={"best": best})
    block = readme.numbers()
    assert "**2.00×** [1.90, 2.10], k = 4" in block and "not measured yet" in block
    assert "loses: 2 of 4" in block and "| lookup, once more on fresh prompts | 1 | 2 | 0.80× |" in block
    assert "| medium | 1 | 8 | 0.70× |" in block and "| small | 0 | 4" not in block and "second machine" not in block
    report.record("cpu", "benchmark_second_machine_cells", params={}, values={}, rows=cells[1:])
    report.record("cpu", "benchmark_second_machine", params={"n_prompts": 1, "new_tokens": 2}, values={"best": {"target T=1": {"tokens_per_second": 9}}})
    assert "loses on the second machine: 1 of 1" in readme.numbers() and "loses: 2 of 4" in readme.numbers()
    again = [cells[1] | {"speedup": 1.1}, {"draft": "small distilled", "temperature": 1.0, "k": 8, "speedup": 0.6}]
    report.record("cpu", "benchmark_distilled_cells", params={}, values={}, rows=again)  # the headline's: what both measured counts once
    best = {"lookup T=1": {"k": 2, "speedup": 1.2}, "small distilled T=1": {"k": 8, "speedup": 0.9}}
    report.record("cpu", "benchmark_distilled", params={}, values={"best": best})
    assert "loses: 2 of 6" in readme.numbers() and "| small distilled, once more on fresh prompts | 1 | 8 | 0.90× |" in readme.numbers()


def test_the_control_and_what_was_learned_have_a_line():
    report.update_headline("cpu", c=0.1)
    assert "control |" not in readme.numbers() and "A distilled draft took" not in readme.numbers()
    line = {"k": 3, "speedup": 1.25, "ci95_low": 1.2, "ci95_high": 1.3}
    values = {"best": {f"small control T={t}": line for t in (0, 1)}, "as_block": {"small control T=1": line | {"k": 5}}}
    report.record("cpu", "benchmark", params={"draft_ids": 2048}, values={"best": {}})
    report.record("cpu", "benchmark_distilled", params={}, values=values)
    params = {"kind": "neg-log-alpha", "iterations": 400, "texts": "data"}
    report.record("cpu", "distillation", params=params, values={})
    block, cell = readme.numbers(), "**1.25×** [1.20, 1.30], k = "
    assert f"| speed-up C ÷ A, small control | {cell}3 | {cell}3 |" in block and f"both rules agree | {cell}5 |" in block
    assert "took 400 steps more: first forward-kl on the data, in its last phase neg-log-alpha on the data; the control" in block
    assert "B draws one token a call, of all ids, and C" in block and "been trained on, in the same order" in block
    report.record("cpu", "distillation", params=params | {"batches": "others"}, values={})
    assert "in the same order" not in readme.numbers()


def test_figures_about_the_tests_do_not_count_as_checks():
    row = {"name": "x", "figure": 0.5, "bound": 1.0, "n": 3}
    checks = [row | {"kind": "check", "what": what} for what in ("rounds decided differently", "share that was missed")]
    report.record_proof("cpu", [*checks, row | {"kind": "control", "what": "rounds decided differently", "figure": 2.0}], params={})
    assert "none of 1 figures outside its bound (1 more say" in readme.lossless()
    assert json.loads((report.results_dir() / "cpu" / "headline.json").read_text())["lossless"]["checks"] == 1
    block = readme.numbers()
    assert block.index("rounds decided differently") < block.index("| how sharp the counting is |") < block.index("share that was missed")


def test_all_drafts_have_a_line():
    report.update_headline("seed", c=0.1)
    assert "All drafts" not in readme.numbers()
    line = {"k": 3, "speedup": 1.25, "ci95_low": 1.2, "ci95_high": 1.3}
    best = {f"{name} T={t}": line | {"k": t} for name in ("small", "medium") for t in (0, 1)} | {"target T=1": {"speedup": 1.0}}
    rows = [
        {"temperature": float(t), "part": part, "arm": f"C {name} k={t}", "prompt": p, "accepted": accepted, "examined": 8}
        for name, accepted in (("small", 4), ("medium", 6)) for t in (0, 1) for part in ("sweep", "final") for p in (0, 1)
    ]  # fmt: skip
    report.record("seed", "benchmark", params={}, values={"best": best, "as_block": {"medium T=1": line}}, rows=rows)
    block, speeds = readme.numbers(), "1.25× [1.20, 1.30], k = 0 | 1.25× [1.20, 1.30], k = 1"
    assert f"| small | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | {speeds} | — |" in block
    assert f"| medium | 0.75 [0.75, 0.75] | 0.75 [0.75, 0.75] | {speeds} | 1.25× [1.20, 1.30], k = 3 |" in block


def test_the_readme_changes_only_between_its_markers(tmp_path):
    blocks = "\n".join(f"{name}\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in ("headline", "lossless", "numbers"))
    path = tmp_path / "README.md"
    path.write_text(f"before\n{blocks}\nafter\n")
    readme.write(path)
    text = path.read_text()
    assert text.startswith("before\nheadline\n<!-- headline:begin -->\n| models") and text.endswith("<!-- numbers:end -->\nafter\n")
    assert "old" not in text and text == readme.with_blocks(text)
    with pytest.raises(ValueError, match="lacks the markers <!-- lossless:begin -->"):
        readme.with_blocks(text.replace("lossless:", ""))


def test_the_committed_readme_is_what_results_say(monkeypatch):
    monkeypatch.delenv("SPECDEC_RESULTS")
    text = (report.ROOT / "README.md").read_text()
    assert text == readme.with_blocks(text), "run `make reproduce`, or `python -m specdec.readme` after another measurement"


def test_peers_and_recipes_are_shown_once_they_are_recorded():
    report.update_headline("cpu", c=0.1)
    assert "transformers" not in readme.numbers() and "recipe" not in readme.numbers()
    arms = {"ours alone": 100, "transformers alone static cache": 50, "ours draft k=4": 200, "transformers draft k=16": 40}
    cells = [{"arm": arm, "temperature": 1.0, "part": "final", "tokens_per_second": s} for arm, s in arms.items()]
    ratios = {"alone": {"T1": {"value": 2.0, "ci95": [1.9, 2.1]}}, "draft": {"T1": {"value": 5.0, "ci95": [4.5, 5.5]}}}
    report.record("cpu", "peers", params={"draft": "distilled", "transformers": "5.0", "n_prompts": 7}, values={"ours_by_theirs": ratios, "cells": cells})
    report.record("cpu", "recipes", params={}, values={}, rows=[{"recipe": "control", "role": "small", "text, T = 1": 0.5}])
    assert "make batches" not in readme.numbers() and "; `make distill`):" in readme.numbers()
    report.record("cpu", "batches", params={"batches": "others"}, values={}, rows=[{"recipe": "as trained, on its own", "text, T = 1": 0.25}])
    block = readme.numbers()
    assert "| target alone | 1 | 100 | 50 | 2.00× [1.90, 2.10] |" in block
    assert "| with the draft | 1 | 200 | 40 | 5.00× [4.50, 5.50] |" in block
    assert "| as trained, on its own | 0.250 |" in block and "; `make batches`):" in block
    assert "| control | 0.500 |" in block and "on 7 texts, each side at the best of the settings that were tried, up to k = 16 for them" in block


def test_an_unattended_run_tells_what_it_trained_and_where_it_was_measured():
    report.update_headline("seed", tokens_per_second={"A": 10, "B": 90, "C": 20})
    assert "Trained on" not in readme.numbers() and "A decoding step" not in readme.numbers()
    line = {"weights": 3e6, "seconds": 5.0, "flops": 7e12, "validation_loss": 4.5}
    report.record("seed", "training", params={"target": {"tokens": 2e6}}, values={"target": line})
    steps = [
        {"sizes": "seed", "passes": passes, "model": model, "dtype": "bfloat16", "seconds": 0.004, "fraction": 0.5, "v5": 1.1, "v9": 1.2}
        for passes in ("eager", "graphs") for model in ("target", "small")
    ]  # fmt: skip
    data = {"tokens": 4e6, "source": "local text", "sha256": "0123456789abcdef"}
    report.record("seed", "roofline", params={"data": data}, values={"steps": steps})
    cell = {"speedup": 1.5, "ci95_low": 1.4, "ci95_high": 1.6, "tokens_per_second": 70}
    two_cores = {"target T=1": cell, "small T=0": cell, "small distilled T=1": cell}
    params, values = {"n_prompts": 9, "new_tokens": 5}, {"best": two_cores, "as_block": {"small distilled T=1": cell}}
    report.record("seed", "benchmark_two_cores", params=params | {"drafts": "distillation_old"}, values=values, rows=[
        {"prompt": prompt, "part": part} for prompt, part in ((0, "sweep"), (1, "sweep"), (1, "sweep"), (2, "final"))
    ])  # fmt: skip
    text = readme.numbers()
    assert "4.0M tokens of local text (sha256 of the tokens 0123456789ab…)" in text
    assert "| target | 3.0M | 2.0M | 5 | 7 | 4.500 |" in text and "| graphs | 4.00 | 50% | 1.10 | 1.20 | 4.00 | — |" in text
    assert "with 9 held-out prompts (on the GPU itself C ÷ A is not measured yet)" in text
    report.record("seed", "benchmark", params={"unfinished": True}, values={"best": {}})  # cut off
    assert "two CPU cores** with" in readme.numbers() and "In other ways" not in readme.numbers()
    report.record("seed", "benchmark", params={}, values={"best": {}})  # once it is, two cores are no longer the headline
    params = {"texts": "data+target", "tokens": 6e6, "own_text": 1e6, "iterations": 4000, "divergence": "neg-log-alpha"}
    report.record("seed", "distillation", params=params, values={})
    text = readme.numbers()
    assert "two CPU cores** with" not in text and "took 4,000 steps, 6.0M tokens, more: first" in text and "(1.0M tokens of it)" in text
    assert "| two CPU cores, distilled as in `distillation_old.json` |" in text
    assert "| 9 × 5, 2 | 70 | 1.50× [1.40, 1.60] | — | — | — | 1.50× [1.40, 1.60] | 1.50× [1.40, 1.60] | — |" in text
    values["prediction"] = {"fresh": {"r2": None, "mean_error": 0.2, "within": 3, "n": 6}}
    report.record("seed", "benchmark_two_cores", params={"n_prompts": 9, "new_tokens": 5, "draft_ids": 8192}, values=values)
    text = readme.numbers()
    assert "| two CPU cores; drafts offer the 8,192 ids that the training text uses most |" in text
    assert "| R² = —, +20% on average, 3 of 6 within the interval |" in text


def test_runs_are_shown_by_their_spread():
    report.update_headline("cpu", c=0.1)
    assert "further processes" not in readme.numbers()
    rows = [
        {"run": run, "temperature": 1.0, "arm": arm, "draft": draft, "rule": rule, "k": 5, "speedup": speedup, "target_alone": 500 + run}
        for run, speedups in enumerate(((1.01, 2.5), (0.99, 2.0), (1.0, 3.0)), 1)
        for arm, draft, rule, speedup in (("A again", None, None, speedups[0]), ("C small block k=5", "small", "block", speedups[1]))
    ]  # fmt: skip
    report.record("cpu", "runs", params={"decoded_in": "bfloat16"}, values={}, rows=rows)
    block = readme.numbers()
    assert "in 3 further processes on" in block and "| target alone, T = 1, tokens/s | 501 | 502 | 503 |" in block
    assert "| A ÷ A, T = 1 | 0.990 | 1.000 | 1.010 |" in block and "| small, judged as a block, T = 1, k = 5 | 2.00× | 2.50× | 3.00× |" in block
