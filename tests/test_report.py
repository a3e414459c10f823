import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from specdec import readme, report


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


def test_the_proof_is_a_table_and_a_paragraph(results):
    assert "Not recorded yet" in readme.lossless() and "Not recorded yet" in readme.numbers()
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
    block = readme.lossless()
    assert "none of 2 figures" in block and "1 deliberate mistakes" in block and "of these 3 controls none passed unnoticed" in block
    block = readme.numbers()
    assert "| total variation | 2 | 3e-16 | 1e-12 | 3,000 |" in block
    assert "| always accept | total variation | 0.3 | 0.0001 |" in block
    report.record_proof("cpu", [row | {"figure": 1e-6} for row in rows], params={})
    assert "found 2 of 2 figures outside" in readme.lossless() and "3 controls 3 passed unnoticed" in readme.lossless()


def test_a_run_that_checks_nothing_leaves_the_proof_alone(tmp_path):
    tests, environment = Path(__file__).parent, os.environ | {"SPECDEC_RESULTS": str(tmp_path), "SPECDEC_PROFILE": "ci"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--record-proof", str(tests / "test_edges.py")]
    assert subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True).returncode == 0
    assert not list(tmp_path.rglob("*"))
