"""The divergences against their definitions, and that a distillation differs from its control in the loss alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import specdec.distill as distill
import specdec.train as loop
from specdec import report
from specdec.data import DataConfig, TokenData
from specdec.distill import DIVERGENCES, TEXTS, acceptance, distillation_loss, load_or_distill, stages_of, written
from specdec.engine import generate
from specdec.inference import ready
from specdec.model import ModelConfig, Transformer
from specdec.profiles import PROFILES, Phase, Profile, Schedule
from specdec.reproduce import RECIPES, compare_batches, compare_recipes
from specdec.sampling import Sampling
from specdec.train import cross_entropy, load_or_train, train

CONFIG = ModelConfig(2, 2, 16, 1, vocab_size=32, n_ids=30, context=16, dropout=0.0)
SCHEDULE = Schedule((Phase(6, 2, 1e-2, 0.1, 1, 4, 3),), 16, evaluation_batches=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toy products are slower on many threads, and far slower when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Definitions are compared to more digits than bfloat16 has."""
    monkeypatch.setattr(distill, "has_bf16", lambda *_: False)
    monkeypatch.setattr(loop, "has_bf16", lambda *_: False)


def toy_data(n: int = 2000) -> TokenData:
    tokens = torch.randint(30, (n,), generator=torch.Generator().manual_seed(3)).numpy().astype(np.uint16)
    return TokenData(tokens[: n // 2], tokens[n // 2 :], None, {"sha256": "toy"})


def toy_model(seed: int = 0, sharpness: float = 20.0, **changed) -> Transformer:
    """A random model whose distributions are far from uniform."""
    model = Transformer(replace(CONFIG, **changed), torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.head.weight *= sharpness
    return model


@pytest.fixture
def ids():
    return torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(1))


def by_hand(kind: str, p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double(), q.double()
    return {
        "forward-kl": (p * (p / q).log()).sum(-1),
        "total-variation": 0.5 * (p - q).abs().sum(-1),
        "neg-log-alpha": -torch.minimum(p, q).sum(-1).log(),
    }[kind].mean().item()  # fmt: skip


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_is_its_definition(kind, ids):
    teacher, student = toy_model(0), toy_model(1, n_layers=1)
    value = distillation_loss(teacher, kind)(student, ids, None)
    p, q = (m(ids)[..., :30].detach().softmax(-1) for m in (teacher, student))
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(by_hand(kind, p, q), rel=1e-5) and value.item() > 0.1


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_of_equal_models_is_zero(kind, ids):
    assert distillation_loss(toy_model(), kind)(toy_model(), ids, None).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_padding_ids_do_not_count(kind, ids):
    teacher, student = toy_model(0), toy_model(1)
    before = distillation_loss(teacher, kind)(student, ids, None).item()
    with torch.no_grad():
        teacher.head.weight[30:] += 9
        student.head.weight[30:] -= 9
    loss = distillation_loss(teacher, kind)(student, ids, None)
    assert loss.item() == pytest.approx(before, rel=1e-6)
    loss.backward()
    assert student.head.weight.grad[30:].abs().max() == 0 and student.head.weight.grad[:30].abs().max() > 0


def test_inequalities_between_the_divergences(ids):
    """1 − α = TV; −log α ≥ TV; Pinsker: TV ≤ √(KL/2). Each holds for the means as well (Jensen)."""
    for seed in range(1, 6):
        kl, tv, nla = (distillation_loss(toy_model(0), k)(toy_model(seed), ids, None).item() for k in DIVERGENCES)
        assert 0 <= tv <= 1 and nla >= tv and tv <= (kl / 2) ** 0.5


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_step_against_the_gradient_comes_closer(kind, ids):
    student = toy_model(1)
    loss = distillation_loss(toy_model(0), kind)
    before = loss(student, ids, None)
    before.backward()
    with torch.no_grad():
        for weight in student.parameters():
            weight -= 1e-2 * weight.grad / max(weight.grad.norm(), 1e-12)
    assert loss(student, ids, None) < before


def test_the_teacher_is_a_fixed_copy(ids):
    teacher, student = toy_model(0), toy_model(1)
    teacher.train()
    loss = distillation_loss(teacher, "forward-kl")
    before = loss(student, ids, None)
    before.backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters()) and teacher.training
    with torch.no_grad():
        teacher.head.weight.zero_()
    assert torch.equal(loss(student, ids, None), before)


def test_bfloat16_teacher_is_close(monkeypatch, ids):
    exact = distillation_loss(toy_model(0), "forward-kl")(toy_model(1), ids, None)
    monkeypatch.setattr(distill, "has_bf16", lambda *_: True)
    rounded = distillation_loss(toy_model(0), "forward-kl")(toy_model(1), ids, None)
    assert rounded.dtype == torch.float32 and rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_unknown_divergence_gets_a_sentence():
    with pytest.raises(ValueError, match="no divergence 'hellinger'; choose one of forward-kl"):
        distillation_loss(toy_model(), "hellinger")


# --- acceptance ---------------------------------------------------------------------------------------------------


def test_acceptance_is_one_minus_total_variation():
    target, draft, data = toy_model(0), toy_model(1), toy_data()
    alpha = acceptance(target, draft, data, n_windows=4)
    assert alpha.shape == (4, 16) and ((0 <= alpha) & (alpha <= 1)).all()
    first = torch.from_numpy(data.validation[:16].astype(np.int64))[None]
    p, q = (m(first)[0, :, :30].softmax(-1) for m in (target, draft))
    torch.testing.assert_close(alpha[0], 1 - 0.5 * (p - q).abs().sum(-1), rtol=0, atol=1e-5)


def test_acceptance_of_a_model_by_itself_is_one():
    for temperature in (0.0, 0.7, 1.0):
        alpha = acceptance(toy_model(), toy_model(), toy_data(), temperature=temperature, n_windows=3, block_size=8)
        assert alpha.shape == (3, 8)
        torch.testing.assert_close(alpha, torch.ones(3, 8))


def test_acceptance_follows_the_temperature():
    target, draft, data = toy_model(0), toy_model(1), toy_data()
    greedy, cold, hot = (
        acceptance(target, draft, data, temperature=t, n_windows=8).mean().item() for t in (0.0, 1e-4, 1e4)
    )
    assert cold == pytest.approx(greedy, abs=0.02)  # temperature 0 is the limit: the argmax agrees or not
    assert hot == pytest.approx(1.0, abs=1e-3)  # and at the other end both are uniform


# --- distillation -------------------------------------------------------------------------------------------------


def test_distillation_raises_acceptance_above_the_control():
    """On text that teaches nothing (uniform tokens) only the target's distribution can."""
    data, target = toy_data(), toy_model(0, sharpness=8.0, n_layers=1)
    schedule = Schedule((Phase(120, 5, 1e-2, 0.0, 1, 8, 120),), 16, evaluation_batches=1)
    alpha = {}
    for kind in ("control", *DIVERGENCES):
        draft = toy_model(2, sharpness=8.0, n_layers=1)
        before = acceptance(target, draft, data, n_windows=8).mean()
        train(draft, data, schedule, loss=cross_entropy if kind == "control" else distillation_loss(target, kind))
        alpha[kind] = acceptance(target, draft, data, n_windows=8).mean()
    for kind in DIVERGENCES:
        assert alpha[kind] > before + 0.1 and alpha[kind] > alpha["control"] + 0.05, alpha


@pytest.fixture
def profile(monkeypatch, tmp_path) -> Profile:
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path))
    for module in (distill, loop):
        monkeypatch.setattr(module, "tokens_for", lambda profile: toy_data())
    monkeypatch.setattr(TokenData, "eot", 29)
    models = {"target": CONFIG, "small": replace(CONFIG, n_layers=1)}
    schedules = {"target": SCHEDULE, "small": SCHEDULE}
    return Profile("toy", DataConfig(), models, schedules, replace(SCHEDULE, seed=7), PROFILES["ci"].bench)


@pytest.fixture
def trainings(monkeypatch):
    """Every training from here on: the model's name and the batches that it read."""
    seen, original = [], loop.train

    def recorded(model, data, schedule, *, loss, title, **options):
        seen.append((title.split()[-1], ids := []))
        watched = lambda model, i, targets: (ids.append(i), loss(model, i, targets))[1]  # noqa: E731
        return original(model, data, schedule, loss=watched, title=title, **options)

    monkeypatch.setattr(loop, "train", recorded)
    return seen


def test_control_and_distillation_differ_in_the_loss_alone(profile, monkeypatch):
    seen = {}
    original = loop.train

    def recorded(model, data, schedule, *, loss, title, **options):
        if not title.endswith(("forward-kl", "cross-entropy")):
            return original(model, data, schedule, loss=loss, title=title, **options)
        record = seen[title.split()[-1]] = {"start": {n: w.clone() for n, w in model.state_dict().items()}, "ids": []}

        def watched(model, ids, targets):
            record["ids"].append(ids)
            return loss(model, ids, targets)

        return original(model, data, schedule, loss=watched, title=title, **options)

    monkeypatch.setattr(loop, "train", recorded)
    distilled, history = load_or_distill(profile, "forward-kl")
    control, _ = load_or_distill(profile, "cross-entropy")
    small, _ = load_or_train(profile, "small")
    a, b = seen["small-forward-kl"], seen["small-cross-entropy"]
    for name, weight in small.state_dict().items():
        assert torch.equal(weight, a["start"][name]) and torch.equal(weight, b["start"][name]), name
    assert len(a["ids"]) == len(b["ids"]) == 6 and all(map(torch.equal, a["ids"], b["ids"]))
    assert not torch.equal(distilled.head.weight, control.head.weight) and not distilled.training
    assert [row["iteration"] for row in history.rows] == [3, 6]

    monkeypatch.setattr(loop, "train", None)  # all of it is there now: nothing is trained again
    again, same = load_or_distill(profile, "forward-kl")
    assert torch.equal(again.head.weight, distilled.head.weight) and same.rows == history.rows


@pytest.mark.parametrize("texts, divergence", [("data+target", "forward-kl"), ("data", "neg-log-alpha")])
def test_control_is_split_as_the_distillation_is(profile, trainings, texts, divergence):
    """A training begun anew forgets what its optimizer knew. And no training reads the batches of one before it again: the
    distillation's last phase may have other text to read, the control has not."""
    two = replace(profile, distillation=replace(SCHEDULE, phases=SCHEDULE.phases * 2), texts=texts, divergence=divergence)
    for role in ("target", "small"):
        load_or_train(two, role)
    load_or_distill(two, "cross-entropy")
    load_or_distill(two)
    last = f"small-{divergence}"
    assert [name for name, _ in trainings] == ["target", "small", *["small-cross-entropy"] * 2, "small-forward-kl", last]
    draft, *further = (ids for _, ids in trainings[1:])
    control, distilled = further[:2], further[2:]
    assert [len(ids) for ids in control] == [len(ids) for ids in distilled] == [6, 6]
    assert all(map(torch.equal, control[0], distilled[0]))
    assert all(map(torch.equal, control[1], distilled[1])) == (texts == "data")
    read = [ids for training in (draft, *control) for ids in training]
    assert not any(torch.equal(a, b) for i, a in enumerate(read) for b in read[:i])


def test_forward_kl_goes_first():
    two = replace(SCHEDULE, phases=(SCHEDULE.phases[0], replace(SCHEDULE.phases[0], iterations=4)))
    assert [(kind, s.iterations) for kind, s in stages_of(two, "neg-log-alpha")] == [("forward-kl", 6), ("neg-log-alpha", 4)]
    for kind in ("forward-kl", "cross-entropy"):
        assert stages_of(two, kind) == [(kind, replace(two, seed=two.seed + 1))]
    assert stages_of(SCHEDULE, "total-variation") == [("total-variation", replace(SCHEDULE, seed=SCHEDULE.seed + 1))]


def test_the_history_goes_on_over_both_stages(profile):
    two = replace(profile, distillation=replace(SCHEDULE, phases=SCHEDULE.phases * 2))
    draft, history = load_or_distill(two, "total-variation")
    assert [row["iteration"] for row in history.rows] == [3, 6, 9, 12]
    assert [row["tokens"] for row in history.rows] == [64 * i for i in (3, 6, 9, 12)]
    assert history.rows[2]["seconds"] > history.rows[1]["seconds"]
    warm, _ = load_or_distill(replace(two, distillation=SCHEDULE), "forward-kl")
    assert not torch.equal(draft.head.weight, warm.head.weight)


class TestWritten:
    tokens = toy_data().train

    def test_texts_begin_with_the_data_and_end_with_a_mark(self):
        model = toy_model()
        texts = written(model, self.tokens, 7, 12, eot=29, seed=1, prompt_tokens=4, batch_size=3).reshape(7, 12)
        begins = {tuple(self.tokens[i : i + 4]) for i in range(len(self.tokens) - 3)}
        assert all(tuple(text[:4]) in begins and text[-1] == 29 for text in texts)
        again = written(model, self.tokens, 7, 12, eot=29, seed=1, prompt_tokens=4, batch_size=3).reshape(7, 12)
        other = written(model, self.tokens, 7, 12, eot=29, seed=2, prompt_tokens=4, batch_size=3).reshape(7, 12)
        assert (texts == again).all() and not (texts == other).all()

    def test_a_greedy_text_is_the_engine_s(self):
        model = toy_model()
        for text in written(model, self.tokens, 5, 12, eot=29, seed=1, prompt_tokens=4, temperature=0).reshape(5, 12).tolist():
            assert text[4:-1] == list(generate(model, text[:4], max_new_tokens=7, sampling=Sampling(0)))

    def test_its_law_is_the_model_s(self):
        model = toy_model(sharpness=40.0)
        texts = torch.from_numpy(written(model, np.array([3] * 9), 4000, 3, eot=0, seed=0, prompt_tokens=1).astype(int))
        p = model(torch.tensor([[3]]))[0, -1, :30].softmax(-1)
        seen = texts.view(-1, 3)[:, 1].bincount(minlength=30) / 4000
        assert 0.5 * (seen - p).abs().sum() < 0.05  # some four times what 4,000 draws leave


def test_whose_text_is_read(profile):
    drafts = {text: load_or_distill(profile, "forward-kl", texts=text)[0].head.weight for text in TEXTS}
    assert not any(torch.equal(drafts["data"], drafts[text]) for text in TEXTS if text != "data")
    files = sorted((distill.build_dir() / "toy" / "tokens").glob("*.npy"))
    assert [path.name.split("-")[0] for path in files] == ["data+target", "draft", "target"]
    assert all(len(np.load(path)) == profile.distillation.tokens for path in files[1:])
    with pytest.raises(ValueError, match="no text of 'nobody'"):
        load_or_distill(profile, "forward-kl", texts="nobody")


def test_the_last_phase_reads_texts_as_they_will_be_asked_for(profile, monkeypatch):
    """After the data's and then beside them, at every temperature of the benchmark, of its length, not more than wanted."""
    bench = replace(profile.bench, prompt_tokens=3, new_tokens=5, temperatures=(0.0, 1.0))
    two = replace(profile, distillation=replace(SCHEDULE, phases=SCHEDULE.phases * 2), bench=bench, own_text=64)
    read, real = [], distill.trained
    monkeypatch.setattr(distill, "trained", lambda *a: read.append((a[4].train, a[5].iterations)) or real(*a))
    load_or_distill(two, "forward-kl", texts="data+target")
    (first, n), (last, m) = read
    assert n == m == SCHEDULE.iterations and first is not last and len(last) == 128
    assert last[64:].tolist() == toy_data().train[:64].tolist()
    last = last[:64]
    target = ready(load_or_train(two, "target")[0])  # as it writes
    greedy = last[:32].reshape(4, 8).tolist()
    assert all(text[3:-1] == list(generate(target, text[:3], max_new_tokens=4, sampling=Sampling(0))) for text in greedy)
    assert all(text[-1] == toy_data().eot for text in last.reshape(8, 8).tolist())


@pytest.mark.parametrize("changed", [{"new_tokens": 6}, {"prompt_tokens": 4, "new_tokens": 4}, {"temperatures": (0.5, 1.0)}])
def test_other_texts_have_other_names(profile, monkeypatch, changed):
    """What the target writes depends on the benchmark's settings, so the draft that reads it does."""
    profile = replace(profile, bench=replace(profile.bench, prompt_tokens=3, new_tokens=5, temperatures=(0.0, 1.0)))
    other = replace(profile, bench=replace(profile.bench, **changed))

    def files():
        return {path.name for folder in ("tokens", "checkpoints") for path in (distill.build_dir() / "toy" / folder).iterdir()}

    load_or_distill(profile, "forward-kl", texts="data+target")
    before = files()
    load_or_distill(other, "forward-kl", texts="data+target")
    assert sorted(name.rpartition("-")[0] for name in files() - before) == ["data+target", "small-forward-kl"]
    monkeypatch.setattr(distill, "_WRITERS", "other")
    before = files()
    load_or_distill(profile, "forward-kl", texts="data+target")
    assert len(files() - before) == 2


def test_every_recipe_is_compared_and_recorded(profile, monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr("specdec.reproduce.tokens_for", lambda profile: toy_data())
    said = []
    lines = compare_recipes(profile, n_windows=4, say=said.append)
    assert len(lines) == len(said) == 1 + len(RECIPES) == len(report.load_rows("toy", "recipes"))
    assert all(0 <= value <= 1 for line in lines for name, value in line.items() if "T =" in name)


def test_a_draft_on_batches_of_its_own_is_compared_with_one_on_the_target_s(profile, trainings, monkeypatch, tmp_path):
    """The schedules of a profile have one seed; in the comparison one draft has another, and reads nothing that was read before."""
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr("specdec.reproduce.tokens_for", lambda profile: toy_data())
    lines = compare_batches(replace(profile, distillation=SCHEDULE), n_windows=4, say=lambda line: None)
    assert [line["recipe"] for line in lines] == [
        f"{what} {batches}" for batches in ("the target's batches", "batches of its own")
        for what in ("as trained, on", "control, begun on", "distilled, begun on")
    ]  # fmt: skip
    assert [name for name, _ in trainings] == ["target", *["small", "small-cross-entropy", "small-forward-kl"] * 2]
    target, small, control, distilled, own, own_control, own_distilled = (ids for _, ids in trainings)
    assert all(map(torch.equal, target, small)) and all(map(torch.equal, control, own_control)) and all(map(torch.equal, distilled, own_distilled))
    assert not any(torch.equal(a, b) for a in own for b in [*target, *control, *distilled])
    assert lines[0]["held-out text, T = 1"] != lines[3]["held-out text, T = 1"] and len(report.load_rows("toy", "batches")) == len(lines)


def test_unknown_kind_gets_a_sentence_before_any_training(profile, monkeypatch):
    monkeypatch.setattr(loop, "train", None)
    with pytest.raises(ValueError, match="no divergence 'hellinger'"):
        load_or_distill(profile, "hellinger")
