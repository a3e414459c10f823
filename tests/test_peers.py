"""transformers as arms beside ours: the same greedy text, and nothing unequal about the conditions."""

import json
import sys
import warnings

import pytest
import torch
from conftest import make_model

from specdec import bench, peers
from specdec.__main__ import main
from specdec.drafting import DraftModel, PromptLookup
from specdec.engine import Trace
from specdec.profiles import BenchConfig
from specdec.sampling import Randomness, Sampling

CONFIG = BenchConfig(n_prompts=3, prompt_tokens=8, new_tokens=24, ks=(1, 3), n_sweep_prompts=1, dtype="float32")
PROMPTS = [[3, 1, 4, 1, 0, 2], [2, 2, 4], [0]]


def models():
    """A target and a draft in float32; id 5, 6 and 7 are padding, 4 is end-of-text."""
    shape = dict(vocab_size=8, n_ids=5, context=64)
    return make_model(2, 16, 14, **shape).float(), make_model(1, 16, 7, **shape).float()


@pytest.fixture(scope="module")
def equipment():
    pytest.importorskip("transformers")
    target, draft = models()
    their = {name: peers.peer(model, torch.float32) for name, model in (("target", target), ("draft", draft))}
    lookup = PromptLookup(5)

    def families(sampling):
        return peers.contestants(target, their["target"], DraftModel(draft), their["draft"], lookup, CONFIG, sampling)

    return families, their


def texts(arm, seed=0):
    traces = [Trace() for _ in PROMPTS]
    for prompt, trace in zip(PROMPTS, traces):
        arm(prompt, Randomness(seed), trace)
    return [trace.tokens for trace in traces]


def test_every_arm_writes_the_same_greedy_text(equipment):
    families, _ = equipment
    arms = {(f, name): arm for f, members in families(Sampling(0)).items() for name, arm in members.items()}
    expected = texts(arms["ours alone", ""])
    assert all(len(text) == CONFIG.new_tokens for text in expected)
    assert any(4 in text[:-1] for text in expected)  # a stop token does not end it
    assert len(arms) == 12
    for name, arm in arms.items():
        assert texts(arm) == expected, name


def test_sampled_arms_follow_the_seed_and_leave_torch_alone(equipment):
    families, _ = equipment
    before = torch.random.get_rng_state()
    for family, members in families(Sampling(1.0)).items():
        for name, arm in members.items():
            one, again, other = texts(arm, 1), texts(arm, 1), texts(arm, 2)
            assert one == again != other, (family, name)
            assert all(len(text) == CONFIG.new_tokens and max(text) < 5 for text in one), (family, name)
    assert torch.equal(before, torch.random.get_rng_state())


def test_sampling_filters_reach_them(equipment):
    families, _ = equipment
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(0.001)):  # all as good as greedy
        arms = families(sampling)
        expected = texts(families(Sampling(0))["ours alone"][""])
        assert texts(arms["transformers alone"][""]) == expected and texts(arms["transformers draft"]["k=3"]) == expected


def test_k_is_what_it_says(equipment):
    """A draft that is the target itself is always right, so passes count k."""
    _, their = equipment
    sure = models()[0]
    sure.head.weight.data *= 10  # of itself, that is: by default the library drafts on only while its draft is
    twin = peers.peer(sure, torch.float32)
    constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    for k in (1, 2, 3, 5):
        arm = peers.their_arm(their["target"], CONFIG, Sampling(0), draft=twin, drafting={"num_assistant_tokens": k} | constant)
        trace = Trace()
        arm(PROMPTS[0], Randomness(0), trace)
        assert trace.target_passes == -(-CONFIG.new_tokens // (k + 1))
    trace = Trace()
    peers.their_arm(their["target"], CONFIG, Sampling(0), draft=twin)(PROMPTS[0], Randomness(0), trace)
    assert twin.generation_config.num_assistant_tokens is None and trace.target_passes < 4  # the library's own again


def test_peers_are_quiet(equipment, capsys):
    families, _ = equipment
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (0, 0.7):
            for members in families(Sampling(temperature)).values():
                for arm in members.values():
                    texts(arm)
    assert capsys.readouterr() == ("", "")


def test_peer_keeps_weights_and_data_type():
    pytest.importorskip("transformers")
    target, _ = models()
    theirs = peers.peer(target, torch.bfloat16)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32  # rounded angles would be another model
    assert torch.equal(theirs.lm_head.weight, target.head.weight.bfloat16())


def test_arms_can_be_measured_interleaved(equipment):
    families, _ = equipment
    both = families(Sampling(0))
    arms = {"ours": both["ours draft"]["k=3"], "theirs": both["transformers draft"]["k=3"]}
    rows = bench.measure(arms, PROMPTS, seed=0)
    assert len(rows) == 6 and all(r["tokens"] == CONFIG.new_tokens and r["seconds"] > 0 for r in rows)
    assert bench.cell(rows, "theirs", "ours")["tokens_per_target_pass"] > 1


def test_command_records_the_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from dataclasses import replace

    from specdec import __main__ as cli

    profile = cli.get_profile("ci")
    small = replace(profile, bench=replace(profile.bench, n_prompts=2, n_sweep_prompts=1, new_tokens=6, ks=(2,)))
    monkeypatch.setattr(cli, "get_profile", lambda name: small)
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path / "results"))
    assert main(["bench", "--peers"]) == 0
    out = capsys.readouterr().out
    for words in ("ours alone", "ours draft k=2", "transformers draft", "transformers lookup k=2", "lookup, T1:"):
        assert words in out, words
    saved = json.loads((tmp_path / "results" / "ci" / "peers.json").read_text())
    assert saved["params"]["transformers"] == sys.modules["transformers"].__version__
    assert len([c for c in saved["values"]["cells"] if c["part"] == "final"]) == 12  # six families, two temperatures
    assert (tmp_path / "results" / "ci" / "peers.csv").read_text().count("\n") == 1 + 2 * (8 + 6 * 2)
    assert all(saved["values"]["ours_by_theirs"][kind]["T0"]["value"] > 0 for kind in peers.KINDS)


def test_without_transformers_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "--profile", "ci", "--peers"]) == 2
    assert "pip install 'specdec[peers]'" in capsys.readouterr().err
