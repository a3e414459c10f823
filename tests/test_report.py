import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from specdec import report


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path))
    return tmp_path


def test_a_result_has_three_keys_and_its_rows(results):
    rows = [{"k": 1, "x": 0.123456789}, {"k": 2, "y": "a"}]
    report.record("cpu", "toy", params={"k": (1, 2)}, values={"good": 1.5, "bad": math.nan}, rows=rows, seed=3)
    saved = report.load("cpu", "toy")
    assert set(saved) == {"params", "values", "provenance"}
    assert saved["params"]["k"] == [1, 2] and saved["values"] == {"good": 1.5, "bad": None}
    assert {"commit", "dirty", "machine", "threads", "versions", "seed"} <= set(saved["provenance"])
    assert (results / "cpu" / "toy.csv").read_text() == "k,x,y\n1,0.123457,\n2,,a\n"
    assert report.load_rows("cpu", "toy")[1]["k"] == 2.0
    assert not list(results.rglob("*.partial"))


def test_what_was_not_run_is_a_sentence():
    with pytest.raises(ValueError, match="run `make reproduce PROFILE=seed`"):
        report.load("seed", "benchmark")


def test_the_headline_keeps_its_schema(results):
    report.update_headline("cpu", {"commit": "abc"}, c=0.1)
    report.update_headline("cpu", o=0.02)
    saved = json.loads((results / "cpu" / "headline.json").read_text())
    assert list(saved) == list(report.HEADLINE) and (saved["c"], saved["o"]) == (0.1, 0.02)
    assert saved["speedup"]["T0"] == {"value": None, "ci95": None, "k": None} and saved["provenance"] == {"commit": "abc"}
    with pytest.raises(ValueError, match="has no luck"):
        report.update_headline("cpu", luck=1)


def test_equal_pictures_are_equal_files(results):
    for name in ("a", "b"):
        report.style()
        figure, axis = plt.subplots()
        axis.plot([1, 2, 3], color=report.COLORS["target"])
        report.save_figure(figure, "cpu", name)
        plt.close(figure)
    assert (results / "cpu" / "a.png").read_bytes() == (results / "cpu" / "b.png").read_bytes()


def test_the_readme_block_says_what_is_missing_and_prints_what_loses(results):
    assert report.readme_block().count("Not measured yet") == 2
    report.update_headline("cpu", speedup={"T0": {"value": 2.0, "ci95": [1.9, 2.1], "k": 4}, "T1": report.HEADLINE["speedup"]["T1"]})
    cells = [{"draft": "small", "temperature": 0.0, "k": 4, "speedup": 2.0}, {"draft": "medium", "temperature": 1.0, "k": 8, "speedup": 0.7}]
    report.record("cpu", "benchmark_cells", params={}, values={}, rows=cells)
    best = {"small T=0": {"k": 4, "speedup": 1.9}, "lookup T=1": {"k": 2, "speedup": 0.8}, "target T=1": {"speedup": 1.0}}
    report.record("cpu", "benchmark", params={}, values={"best": best})
    block = report.readme_block()
    assert "**2.00×** [1.90, 2.10], k = 4" in block and "not measured yet" in block
    assert "loses: 2 of 4" in block and "| lookup, once more on fresh prompts | 1 | 2 | 0.80× |" in block
    assert "| medium | 1 | 8 | 0.70× |" in block and "| small | 0 | 4" not in block


def test_all_drafts_have_a_line():
    report.update_headline("seed", c=0.1)
    assert "All drafts" not in report.readme_block()
    line = {"k": 3, "speedup": 1.25, "ci95_low": 1.2, "ci95_high": 1.3}
    best = {f"{name} T={t}": line | {"k": t} for name in ("small", "medium") for t in (0, 1)} | {"target T=1": {"speedup": 1.0}}
    rows = [
        {"temperature": float(t), "part": part, "arm": f"C {name} k={t}", "prompt": p, "accepted": accepted, "examined": 8}
        for name, accepted in (("small", 4), ("medium", 6)) for t in (0, 1) for part in ("sweep", "final") for p in (0, 1)
    ]  # fmt: skip
    report.record("seed", "benchmark", params={}, values={"best": best, "as_block": {"medium T=1": line}}, rows=rows)
    block, speeds = report.readme_block(), "1.25× [1.20, 1.30], k = 0 | 1.25× [1.20, 1.30], k = 1"
    assert f"| small | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | {speeds} | — |" in block
    assert f"| medium | 0.75 [0.75, 0.75] | 0.75 [0.75, 0.75] | {speeds} | 1.25× [1.20, 1.30], k = 3 |" in block


def test_the_readme_changes_only_between_its_markers():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_block(text, "new\n") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        report.with_block("nothing", "new")


def test_the_committed_readme_is_what_results_say(monkeypatch):
    monkeypatch.delenv("SPECDEC_RESULTS")
    text = (report.ROOT / "README.md").read_text()
    assert text == report.with_block(text, report.readme_block()), "run `make reproduce`, which rewrites the block"
    proof = report.with_block(text, report.proof_block(), report.PROOF_BEGIN, report.PROOF_END)
    assert text == proof, "run `make proof`, which rewrites the block"


def test_the_proof_is_a_table_and_a_paragraph(results):
    assert "Not recorded yet" in report.proof_block()
    rows = [
        {"kind": "check", "name": "law, k = 1", "what": "total variation", "figure": 2e-16, "bound": 1e-12, "n": 1500},
        {"kind": "check", "name": "law, k = 2", "what": "total variation", "figure": 3e-16, "bound": 1e-12, "n": 1500},
        {"kind": "control", "name": "always accept", "what": "total variation", "figure": 0.3, "bound": 1e-4, "n": None},
        {"kind": "control", "name": "always accept (trained pair)", "what": "χ²", "figure": 9.0, "bound": 6.0, "n": 5},
        {"kind": "control", "name": "a target off by 0.1", "what": "χ²", "figure": 9.0, "bound": 6.0, "n": 5},
    ]
    report.record_proof("cpu", rows, params={})
    assert report.load("cpu", "lossless")["values"]["table"] == rows
    assert [r["name"] for r in report.load_rows("cpu", "lossless")] == [r["name"] for r in rows]
    saved = json.loads((results / "cpu" / "headline.json").read_text())["lossless"]
    assert saved == {"checks": 2, "failed": 0, "mistakes": 1, "controls": 3, "controls_rejected": 3}
    block = report.proof_block()
    assert "none of 2 figures" in block and "1 deliberate mistakes" in block and "of these 3 controls none passed unnoticed" in block
    assert "| total variation | 2 | 3e-16 | 1e-12 | 3,000 |" in block
    assert "| always accept | total variation | 0.3 | 0.0001 |" in block
    report.record_proof("cpu", [row | {"figure": 1e-6} for row in rows], params={})
    assert "found 2 of 2 figures outside" in report.proof_block() and "3 controls 3 passed unnoticed" in report.proof_block()


def test_peers_and_recipes_are_shown_once_they_are_recorded():
    report.update_headline("cpu", c=0.1)
    assert "transformers" not in report.readme_block() and "recipe" not in report.readme_block()
    arms = {"ours alone": 100, "transformers alone static cache": 50, "ours draft k=4": 200, "transformers draft": 40}
    cells = [{"arm": arm, "temperature": 1.0, "part": "final", "tokens_per_second": s} for arm, s in arms.items()]
    ratios = {"alone": {"T1": {"value": 2.0, "ci95": [1.9, 2.1]}}, "draft": {"T1": {"value": 5.0, "ci95": [4.5, 5.5]}}}
    report.record("cpu", "peers", params={"draft": "distilled", "transformers": "5.0"}, values={"ours_by_theirs": ratios, "cells": cells})
    report.record("cpu", "recipes", params={}, values={}, rows=[{"recipe": "control", "role": "small", "text, T = 1": 0.5}])
    block = report.readme_block()
    assert "| target alone | 1 | 100 | 50 | 2.00× [1.90, 2.10] |" in block
    assert "| with the draft | 1 | 200 | 40 | 5.00× [4.50, 5.50] |" in block
    assert "| control | 0.500 |" in block


def test_a_run_that_checks_nothing_leaves_the_proof_alone(tmp_path):
    tests, environment = Path(__file__).parent, os.environ | {"SPECDEC_RESULTS": str(tmp_path), "SPECDEC_PROFILE": "ci"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--record-proof", str(tests / "test_edges.py")]
    assert subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True).returncode == 0
    assert not list(tmp_path.rglob("*"))


def test_an_unattended_run_tells_what_it_trained_and_where_it_was_measured():
    report.update_headline("seed", tokens_per_second={"A": 10, "B": 90, "C": 20})
    assert "Trained on" not in report.readme_block() and "A decoding step" not in report.readme_block()
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
    text = report.readme_block()
    assert "4.0M tokens of local text (sha256 of the tokens 0123456789ab…)" in text
    assert "| target | 3.0M | 2.0M | 5 | 7 | 4.500 |" in text and "| graphs | 4.00 | 50% | 1.10 | 1.20 | 4.00 | — |" in text
    assert "with 9 held-out prompts (on the GPU itself C ÷ A is not measured yet)" in text
    report.record("seed", "benchmark", params={"unfinished": True}, values={"best": {}})  # cut off
    assert "two CPU cores** with" in report.readme_block() and "otherwise" not in report.readme_block()
    report.record("seed", "benchmark", params={}, values={"best": {}})  # once it is, two cores are no longer the headline
    params = {"texts": "data+target", "tokens": 6e6, "own_text": 1e6}
    report.record("seed", "distillation", params=params, values={})
    text = report.readme_block()
    assert "two CPU cores** with" not in text and "read 6.0M tokens more" in text and "(1.0M tokens of it)" in text
    assert "| two CPU cores, distilled as in `distillation_old.json` |" in text
    assert "| 9 × 5, 2 | 70 | 1.50× [1.40, 1.60] | — | — | — | 1.50× [1.40, 1.60] | 1.50× [1.40, 1.60] |" in text
