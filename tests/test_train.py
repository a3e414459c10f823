"""The loop: phases, resume to the last bit, accumulation and data parallelism that change nothing but the speed."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import specdec.train as loop
from specdec.checkpoint import load_training
from specdec.data import DataConfig, TokenData
from specdec.model import ModelConfig, Transformer
from specdec.profiles import PROFILES, Phase, Profile, Schedule
from specdec.train import cross_entropy, evaluate, learning_rate, load_or_train, make_optimizer, source_key, train

CONFIG = ModelConfig(2, 2, 16, 1, vocab_size=32, n_ids=30, context=16, dropout=0.1)
TWO_PHASES = Schedule((Phase(5, 2, 1e-2, 0.1, 2, 2, 2), Phase(3, 0, 5e-3, 0.2, 1, 4, 2)), 16, evaluation_batches=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toy products are slower on many threads, and far slower when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_data(n: int = 2000) -> TokenData:
    """Tokens where each one nearly fixes the next: x → x + 1 mod 30, with a little noise."""
    generator = np.random.default_rng(0)
    tokens = ((np.arange(n) + (generator.random(n) < 0.1).cumsum()) % 30).astype(np.uint16)
    return TokenData(tokens[: n * 3 // 4], tokens[n * 3 // 4 :], None, {"sha256": "toy"})


def toy_model(dtype=torch.float32, **changed) -> Transformer:
    return Transformer(replace(CONFIG, **changed), torch.Generator().manual_seed(0)).to(dtype)


def exact(model, ids, targets):
    """Cross-entropy in the model's own precision, so that float64 models are compared to the last digits."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def assert_same(a: Transformer, b: Transformer, **tolerance):
    for name, weight in a.state_dict().items():
        if tolerance:
            torch.testing.assert_close(weight, b.state_dict()[name], **tolerance)
        else:
            assert torch.equal(weight, b.state_dict()[name]), name


def one_phase(iterations=4, accumulation=1, batch_size=4, **changed) -> Schedule:
    phase = Phase(iterations, 0, 1e-2, 0.1, accumulation, batch_size, 100)
    return Schedule((phase,), 16, evaluation_batches=2, **changed)


# --- what a step does ---------------------------------------------------------------------------------------------


def test_training_learns():
    data, model = toy_data(), toy_model(dropout=0.0)
    history = train(model, data, Schedule((Phase(60, 5, 1e-2, 0.1, 1, 8, 20),), 16, evaluation_batches=2))
    assert history.rows[0]["validation_loss"] < 3.4  # log 30
    assert history.validation_loss < 1.0  # the noise leaves about 0.33
    assert not model.training


def test_history_has_a_row_per_evaluation():
    rows = train(toy_model(), toy_data(), TWO_PHASES).rows
    assert [row["iteration"] for row in rows] == [2, 4, 6, 8]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 512]
    assert set(rows[0]) == {"iteration", "tokens", "learning_rate", "train_loss", "validation_loss", "seconds"}
    assert rows[-1]["tokens"] == TWO_PHASES.tokens and rows[-1]["seconds"] > rows[0]["seconds"] > 0


def test_learning_rate_warms_up_and_decays():
    phase = Phase(100, 10, 1.0, 0.1, 1, 1, 1)
    cosine = [learning_rate(Schedule((phase,), 8), phase, i) for i in range(100)]
    assert cosine[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.55) and cosine[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:]))
    constant = [learning_rate(Schedule((phase,), 8, decay="constant"), phase, i) for i in range(100)]
    assert constant[:10] == cosine[:10] and set(constant[10:]) == {1.0}


def test_each_phase_sets_its_own_rate_and_decay(monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def recorded(self):
        seen.append([dict(group, params=None) for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    train(toy_model(), toy_data(), replace(TWO_PHASES, vocabulary_rate=4.0))
    assert len(seen) == 8
    for i, (matrices, vocabulary, others) in enumerate(seen):
        assert matrices["weight_decay"] == vocabulary["weight_decay"] == (0.1 if i < 5 else 0.2)
        assert others["weight_decay"] == 0.0
        assert matrices["lr"] == others["lr"] and vocabulary["lr"] == 4 * matrices["lr"]
    assert seen[0][0]["lr"] == 5e-3 and seen[1][0]["lr"] == seen[2][0]["lr"] == 1e-2 and seen[5][0]["lr"] == 5e-3


def test_only_matrices_decay():
    model = toy_model()
    matrices, vocabulary, others = make_optimizer(model, (0.9, 0.95)).param_groups
    assert all(p.dim() == 2 for p in matrices["params"]) and all(p.dim() == 1 for p in others["params"])
    assert {id(p) for p in vocabulary["params"]} == {id(model.embedding.weight), id(model.head.weight)}
    assert sorted(id(p) for g in (matrices, vocabulary, others) for p in g["params"]) == sorted(map(id, model.parameters()))
    assert matrices["decays"] == vocabulary["decays"] == 1.0 and others["decays"] == 0.0


def test_accumulation_equals_one_large_batch():
    a, b = toy_model(torch.float64, dropout=0.0), toy_model(torch.float64, dropout=0.0)
    train(a, toy_data(), one_phase(accumulation=4, batch_size=2), loss=exact)
    train(b, toy_data(), one_phase(accumulation=1, batch_size=8), loss=exact)
    assert_same(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def recorded(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    train(toy_model(), toy_data(), one_phase(grad_clip=1e-3))
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_every_loss_sees_the_same_batches():
    """A control and a distillation differ in the loss and in nothing else."""

    def sequence(make):
        seen = []

        def loss(model, ids, targets):
            seen.append((ids.clone(), targets.clone()))
            return make(model, ids, targets)

        train(toy_model(), toy_data(), TWO_PHASES, loss=loss)
        return seen

    a = sequence(cross_entropy)
    b = sequence(lambda model, ids, targets: model(ids).square().mean() + torch.rand(()))  # draws, unlike the other
    assert len(a) == len(b) == 13
    assert all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))
    assert all(torch.equal(ids[:, 1:], targets[:, :-1]) for ids, targets in a)


def test_training_leaves_the_callers_random_state_alone():
    model = toy_model()
    before = torch.get_rng_state()
    train(model, toy_data(), one_phase())
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_printed_without_a_terminal(capsys):
    train(toy_model(), toy_data(), one_phase())
    assert capsys.readouterr() == ("", "")


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_is_in_nats_and_changes_nothing():
    model, data, schedule = toy_model(), toy_data(), one_phase()
    model.train()
    first = evaluate(model, data, schedule)
    assert model.training and evaluate(model, data, schedule) == first  # dropout off, the same windows
    with torch.no_grad():
        model.head.weight.zero_()
    assert evaluate(model, data, schedule) == pytest.approx(np.log(32), abs=1e-5)


def test_held_out_windows_stay_inside_the_text():
    for n in (9, 10, 50, 90_000_003):  # above 2²⁴ positions are no longer exact in float32
        data = TokenData(None, np.broadcast_to(np.uint16(0), n), None, {})
        starts = loop.held_out_starts(data, 16, 8)
        assert starts[0] == 0 and starts[-1] == n - 9 and starts == sorted(starts)
    with pytest.raises(ValueError, match="8 held-out tokens are too few for windows of 8; use more text"):
        loop.held_out_starts(TokenData(None, np.zeros(8, np.uint16), None, {}), 16, 8)


# --- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 5, 6])  # within the first phase, on its border, within the second
def test_resume_is_bit_for_bit(tmp_path, cut):
    data, whole, first, second = toy_data(), toy_model(), toy_model(), toy_model()
    history = train(whole, data, TWO_PHASES)
    train(first, data, TWO_PHASES, folder=tmp_path, stop_after=cut)
    resumed = train(second, data, TWO_PHASES, folder=tmp_path)
    assert_same(whole, second)
    for a, b in zip(history.rows, resumed.rows, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_a_training_cut_by_force_resumes(tmp_path):
    data, whole, cut, resumed = toy_data(), toy_model(), toy_model(), toy_model()
    train(whole, data, TWO_PHASES)
    calls = []

    def killed(model, ids, targets):
        calls.append(1)
        if len(calls) == 12:  # the last phase, after some saved steps
            raise KeyboardInterrupt
        return cross_entropy(model, ids, targets)

    always = replace(TWO_PHASES, checkpoint_seconds=-1.0)
    with pytest.raises(KeyboardInterrupt):
        train(cut, data, always, loss=killed, folder=tmp_path)
    assert load_training(tmp_path)["iteration"] == 6
    train(resumed, data, always, folder=tmp_path)
    assert_same(whole, resumed)


# --- load_or_train ------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(monkeypatch, tmp_path) -> Profile:
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path))
    monkeypatch.setattr(loop, "tokens_for", lambda profile: toy_data())
    schedule = replace(TWO_PHASES, checkpoint_seconds=-1.0)
    return Profile("toy", DataConfig(), {"small": CONFIG}, {"small": schedule}, schedule, PROFILES["ci"].bench)


def test_load_or_train_trains_once(profile, monkeypatch, tmp_path):
    model, history = load_or_train(profile, "small")
    monkeypatch.setattr(loop, "train", None)  # a second training would fail
    again, same = load_or_train(profile, "small")
    assert_same(model, again)
    assert history.rows == same.rows and not model.training and not again.training
    (folder,) = (tmp_path / "toy" / "checkpoints").iterdir()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]  # the resume point is cleared


def test_load_or_train_survives_a_cut(profile, monkeypatch, tmp_path):
    whole, _ = load_or_train(profile, "small")
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path / "cut"))
    calls = []

    def killed(model, ids, targets):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return cross_entropy(model, ids, targets)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "cross_entropy", killed)
        patch.setattr(loop, "evaluate", lambda *_: 0.0)  # or it would spend the killed loss's calls
        load_or_train(profile, "small")
    (folder,) = (tmp_path / "cut" / "toy" / "checkpoints").iterdir()
    assert os.listdir(folder) == ["training.pt"]  # nothing that looks finished
    resumed, _ = load_or_train(profile, "small")
    assert_same(whole, resumed)


def test_load_or_train_never_returns_something_stale(profile, monkeypatch, tmp_path):
    def folders():
        return len(list((tmp_path / "toy" / "checkpoints").iterdir()))

    load_or_train(profile, "small")
    load_or_train(replace(profile, models={"small": replace(CONFIG, n_layers=1)}), "small")
    assert folders() == 2
    load_or_train(replace(profile, schedules={"small": replace(TWO_PHASES, seed=1)}), "small")
    assert folders() == 3
    monkeypatch.setattr(loop, "tokens_for", lambda profile: replace(toy_data(), info={"sha256": "other"}))
    load_or_train(profile, "small")
    assert folders() == 4
    monkeypatch.setattr(loop, "_SOURCES", "other")
    load_or_train(profile, "small")
    assert folders() == 5


def test_unknown_role_gets_a_sentence(profile):
    with pytest.raises(ValueError, match="no model 'large'; choose small"):
        load_or_train(profile, "large")


def test_source_key_sees_code_and_not_remarks(monkeypatch, tmp_path):
    path = tmp_path / "toy.py"
    monkeypatch.setattr(loop, "__file__", str(tmp_path / "train.py"))

    def key(text):
        path.write_text(text)
        return source_key.__wrapped__("toy")

    plain = key("def f(x):\n    return x + 1\n")
    assert plain == key('"""A module."""\n\n\ndef f(x):  # adds\n    """Adds one."""\n\n    return x + 1\n')
    assert plain != key("def f(x):\n    return x + 2\n")
    assert plain != key("def f(x, y=0):\n    return x + 1\n")


# --- machines -----------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_loss_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(loop.shutil, "which", lambda name: None)
    assert loop.compiled(cross_entropy) is cross_entropy


@pytest.mark.parametrize("words", ["ccache g++", "g++ -m64", "g++", "'/opt/my tools/g++'"])
def test_the_compiler_is_one_word_of_what_names_it(words, monkeypatch):
    found = []
    monkeypatch.setenv("CXX", words)
    monkeypatch.setattr(loop.shutil, "which", lambda name: found.append(name) or name)
    loop.can_compile()
    assert found == ["/opt/my tools/g++" if "tools" in words else "g++"]


def test_bfloat16_needs_the_library_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not loop.has_bf16()


def recorded_training(rank: int, world: int, folder: str) -> None:
    """Three steps of one of ``world`` processes; leaves gradients, weights and history in a file."""
    gradients, step = [], torch.optim.AdamW.step

    def recorded(self):
        gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self)

    model = toy_model(torch.float64, dropout=0.0)
    with torch.no_grad():
        model.head.weight += rank  # the chief's weights are the ones that count
    schedule = one_phase(iterations=3, accumulation=2, batch_size=4 // world, grad_clip=1e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        history = train(model, toy_data(), schedule, loss=exact, folder=Path(folder) / f"{world}-{rank}", stop_after=3)
    torch.save((gradients, model.state_dict(), history.rows), Path(folder) / f"{world}-{rank}.pt")


PROCESS = """
import sys
import torch
import torch.distributed as dist
from test_train import recorded_training
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
recorded_training(rank, 2, folder)
dist.destroy_process_group()
"""


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """Gradients, not only weights: AdamW would hide a factor of two."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)],
            cwd=tests.parent, env=environment, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    recorded_training(0, 1, str(tmp_path))
    try:
        for process in started:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in started:
            process.kill()
    alone, chief, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for a, b, c in zip(alone[0], chief[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[1], chief[1], rtol=1e-7, atol=1e-9)
    assert chief[2][-1]["tokens"] == alone[2][-1]["tokens"]
    assert (tmp_path / "2-0" / "training.pt").exists() and not (tmp_path / "2-1").exists()  # only the chief writes
