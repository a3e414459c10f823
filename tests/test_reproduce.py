"""The unattended run: a budget of seconds, results as it goes, and nothing done twice."""

import json
import lzma
from dataclasses import replace

import pytest

from specdec import report
from specdec.__main__ import main
from specdec.data import tokens_for
from specdec.profiles import PROFILES, count, get_profile, scaled
from specdec.reproduce import is_done, label, measure_again, reproduce, stages, training_flops
from specdec.train import load_or_train


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("SPECDEC_PROFILE", raising=False)
    return tmp_path


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_what_is_measured_where_there_is_a_gpu(profile):
    """All ways that passes can run, and two cores, whose drafts offer fewer ids where they do not offer all."""
    planned = stages(profile.bench, "cuda")
    assert {settings.passes for settings, device, _ in planned.values() if device == "cuda"} == {"eager", "compiled", "graphs"}
    settings, device, _ = planned["benchmark_two_cores"]
    ids = profile.bench.draft_ids
    assert device == "cpu" and (settings.draft_ids is None if ids is None else 0 < settings.draft_ids < ids)


def test_the_chain_within_a_budget_of_seconds(home, monkeypatch):
    said = []
    name = reproduce("ci", minutes=0.5, device="cpu", say=said.append)
    base, _, budget = name.partition("@")
    assert base == "ci" and 1 <= count(budget) <= get_profile("ci").schedules["target"].tokens
    training, distillation, benchmark = (report.load("ci", e) for e in ("training", "distillation", "benchmark"))
    assert training["params"]["target"]["tokens"] == get_profile(name).schedules["target"].tokens
    assert training["values"]["target"]["flops"] > 0
    assert set(distillation["values"]["drafts"]) == {"small", "medium", "small distilled", "small control", "medium distilled"}
    assert benchmark["params"]["run"] == name
    drafts = {line["draft"] for line in report.load_rows("ci", "benchmark_cells") if line["draft"]}
    assert drafts == {"small", "medium", "small distilled", "small control", "medium distilled", "lookup"}
    headline = json.loads((home / "results/ci/headline.json").read_text())
    assert headline["speedup_distilled"]["T1"]["value"] > 0 and 0 <= headline["alpha_control"]["T0"]["value"] <= 1
    assert headline["provenance"] == benchmark["provenance"] and headline["prediction"]["fresh"]["n"] == 12
    for t in (0, 1):  # the headline, made from the rows, says what was measured
        line = benchmark["values"]["best"][f"small T={t}"]
        assert headline["alpha"][f"T{t}"] == line["acceptance"] | {"k": line["k"]}

    # the notebooks find the same models under the name that was printed
    monkeypatch.setattr("specdec.train.train", None)
    model, _ = load_or_train(get_profile(name), "target")
    assert model.n_params() == training["values"]["target"]["weights"]

    # what was measured of other models, with other settings or on another machine is not taken for this
    params, machine = benchmark["params"], benchmark["provenance"]["machine"]
    assert is_done(get_profile(name), "benchmark", params)
    assert not is_done(get_profile(name), "benchmark", params | {"fingerprints": params["fingerprints"] | {"target": "another"}})
    assert not is_done(get_profile(name), "benchmark", params | {"prompt_tokens": 1})
    with monkeypatch.context() as context:
        context.setattr(report, "machine", lambda: f"not {machine}")
        assert not is_done(get_profile(name), "benchmark", params)

    # once more: the budget is remembered, nothing is trained, nothing is measured
    monkeypatch.setattr("specdec.bench.run", None)
    monkeypatch.setattr("specdec.reproduce.train", None)
    again = []
    assert reproduce("ci", minutes=0.5, device="cpu", say=again.append) == name
    assert "benchmark: done before" in again

    # the headline's arms by other processes: kept together while they are of the same models, code and machine
    for run in (1, 2):
        lines = measure_again(get_profile(name), device="cpu", say=again.append)
        assert {(line["draft"], line["rule"], line["temperature"]) for line in lines if line["draft"]} == {
            (draft, rule, t) for draft in ("small", "small distilled") for rule, t in (("token-wise", 0.0), ("token-wise", 1.0), ("block", 1.0))
        }  # fmt: skip
        assert {line["k"] for line in lines if line["draft"] == "small" and line["rule"] == "token-wise"} <= {
            best["k"] for key, best in benchmark["values"]["best"].items() if key.startswith("small T")
        }  # fmt: skip
        rows = report.load_rows("ci", "runs")
        assert {row["run"] for row in rows} == set(range(1, run + 1)) and len(rows) == run * len(lines)
    params = report.load("ci", "runs")["params"]
    report.record("ci", "runs", params=params | {"sources": "older"}, values={}, rows=rows)
    measure_again(get_profile(name), device="cpu", say=again.append)
    assert {row["run"] for row in report.load_rows("ci", "runs")} == {1}


def test_local_text_and_a_budget_of_tokens(home, capsys):
    texts = "<|endoftext|>".join(f"{i} The lark sang, the {i} th morning, over field {i * 7} and wood. " * 30 for i in range(60))
    (home / "texts").mkdir()
    with lzma.open(home / "texts/a.txt.xz", "wt") as file:
        file.write(texts)
    source = f"text:{home / 'texts'}"
    assert main(["reproduce", "--profile", "ci", "--tokens", "4k", "--data", source, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "PROFILE=ci@4k" in out and str(home) not in out
    written = "".join(path.read_text() for path in (home / "results/ci").glob("*.json"))
    assert '"source": "local text"' in written and str(home) not in written
    assert report.load("ci", "benchmark")["params"]["data"]["sha256"] == tokens_for(get_profile(f"ci@4k:{home / 'texts'}")).sha256


def test_wrong_budgets_end_with_a_sentence(home, capsys):
    for options, words in (
        (["--minutes", "3", "--tokens", "3M"], "not both"),
        (["--minutes", "0"], "no budget"),
        (["--tokens", "many"], "no number of tokens"),
        (["--data", "sotu"], "text:PATH"),
    ):
        assert main(["reproduce", "--profile", "ci", *options]) == 2
        assert words in capsys.readouterr().err


def test_a_scaled_profile_keeps_its_shape():
    """A hundredth of the tokens, in steps of an eighth (the power of two next to √.01) at √8 times the rates."""
    seed, short = get_profile("seed"), get_profile("seed@340M")
    for role, schedule in short.schedules.items():
        for a, b in zip(schedule.phases, seed.schedules[role].phases, strict=True):
            assert a.learning_rate == pytest.approx(8**0.5 * b.learning_rate)
            assert (a.batch_size, a.accumulation) == (b.batch_size, b.accumulation // 8)
            assert a.iterations == pytest.approx(b.iterations * 8 / 100, rel=0.02)
            assert a.warmup == (a.iterations // 10 if b.warmup else 0) and a.evaluate_every <= b.evaluate_every
        assert schedule.evaluation_batches == seed.schedules[role].evaluation_batches
        assert short.models[role] == replace(seed.models[role], dropout=0.0)
    assert short.schedules["target"].tokens == pytest.approx(340e6, rel=0.01)
    assert short.name == "seed"
    assert scaled(seed, 1.0) == seed
    twice = scaled(seed, 2.0).schedules["target"]
    assert twice.tokens == 2 * seed.schedules["target"].tokens and twice.phases[0].learning_rate == 3e-4


def test_names_of_numbers():
    assert [count(x) for x in ("300M", "1.5B", "20k", "512")] == [3e8, 1.5e9, 2e4, 512]
    assert [label(x) for x in (312.7e6, 24_900, 3)] == ["312M", "24k", "1k"]
    for wrong in ("", "M", "-3M", "infM", "nanB"):
        with pytest.raises(ValueError, match="no number of tokens"):
            count(wrong)


def test_flops_of_the_seed_s_target():
    """6 per weight that is read, 677.8M, and attention over half of 1,024 tokens, 12 · 768 · 1024 · 6."""
    assert training_flops(get_profile("seed").models["target"], 1024) == pytest.approx(6 * 112_970_496 + 56_623_104)
