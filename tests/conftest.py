"""Tiny models and texts for the tests: real classes, small numbers. And the record of the proof."""

import time

import hypothesis
import numpy as np
import pytest
import torch
from oracle import total_variation

from specdec import report, train
from specdec.data import TokenData, build_dir, load_tokenizer, tokens_for
from specdec.model import ModelConfig, Transformer
from specdec.profiles import get_profile

needs_compiler = pytest.mark.skipif(not train.can_compile(), reason="needs a C++ compiler")

EXACT = 1e-12  # what laws computed in float64 may differ by; what is found is a thousand times smaller

torch.set_num_threads(1)  # the models here are too small for two
hypothesis.settings.register_profile("specdec", derandomize=True, deadline=None)
hypothesis.settings.load_profile("specdec")


def make_model(n_layers=2, width=16, seed=0, *, vocab_size=8, n_ids=5, context=16, n_heads=2, n_kv_heads=1, scale=6.0,
               activation="gelu"):  # fmt: skip
    """A random float64 Transformer whose distributions are far from uniform."""
    config = ModelConfig(
        n_layers, n_heads, width, n_kv_heads, vocab_size=vocab_size, n_ids=n_ids, context=context, dropout=0.0,
        activation=activation,
    )
    model = Transformer(config, torch.Generator().manual_seed(seed)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)
    return model


@pytest.fixture
def pair():
    """A target and a cheaper draft that disagrees with it."""
    return make_model(2, 16, 1), make_model(1, 8, 2)


@pytest.fixture
def toy_data():
    """4,000 tokens of a repetitive text over 64 ids, and 1,000 held-out ones."""
    generator = np.random.default_rng(0)
    tokens = (np.arange(5000) * 7 + generator.integers(0, 3, 5000)).astype(np.uint16) % 64
    return TokenData(tokens[:4000], tokens[4000:], load_tokenizer(0), {"sha256": "toy"})


class Untrained(Exception):
    pass


@pytest.fixture(scope="session")
def trained():
    """(target, small draft, data) of the profile, if somebody has trained them; tests train nothing of that size."""
    profile, patch = get_profile(), pytest.MonkeyPatch()

    def refuse(*_, **__):
        raise Untrained

    missing = f"the models of the {profile.name} profile are not trained; `make reproduce PROFILE={profile.name}` does it"
    if not (build_dir() / profile.name / "checkpoints").is_dir():
        pytest.skip(missing)
    with patch.context() as context:
        context.setattr(train, "train", refuse)
        try:
            target, draft = (train.load_or_train(profile, role)[0] for role in ("target", "small"))
        except Untrained:
            pytest.skip(missing)
    return target, draft, tokens_for(profile)


# The record: each check leaves its figure and its bound, each deliberate mistake the figure that rejected it.


class Proof:
    """A table of checks and controls. Said twice, a name keeps its worst figure and counts everything it saw."""

    def __init__(self):
        self.rows = {}

    def check(self, name: str, what: str, figure: float, bound: float, n: int | None = None) -> None:
        """A figure that has to stay within its bound. ``what`` it is; ``n`` things looked at."""
        self._add("check", name, what, float(figure), bound, n, max)
        assert figure <= bound, f"{name}: {what} {figure:.3g} exceeds {bound:.3g}"

    def law(self, name: str, law: dict, exact: dict) -> None:
        """Two enumerated laws that have to be the same but for rounding in float64."""
        self.check(name, "total variation of joint laws", total_variation(law, exact), EXACT, len(exact))

    def control(self, name: str, what: str, figure: float, bound: float, n: int | None = None) -> None:
        """A mistake: its figure has to exceed the bound. A control that passes for right is a failing test."""
        self._add("control", name, what, float(figure), bound, n, min)
        assert figure > bound, f"{name} was not noticed: {what} {figure:.3g} is within {bound:.3g}"

    def _add(self, kind, name, what, figure, bound, n, worst):
        row = {"kind": kind, "name": name, "what": what, "figure": figure, "bound": bound, "n": n}
        old = self.rows.get((kind, name, what))
        if old:
            row |= {"figure": worst(figure, old["figure"]), "n": None if n is None else n + old["n"]}
        self.rows[kind, name, what] = row


_PROOF, _BEGAN = Proof(), time.perf_counter()


@pytest.fixture(scope="session")
def proof():
    return _PROOF


def pytest_addoption(parser):
    parser.addoption("--record-proof", action="store_true", help="write the table of the proof into results/<profile>/")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: takes long; runs when the proof is recorded (`make proof`)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--record-proof"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="thorough; `make proof` runs it"))


def pytest_sessionfinish(session, exitstatus):
    """Only a run in which something was checked and nothing failed leaves a record."""
    if not session.config.getoption("--record-proof") or exitstatus or not _PROOF.rows:
        return
    profile, rows = get_profile().name, list(_PROOF.rows.values())
    report.record_proof(profile, rows, params={"tests": session.testscollected}, seconds=time.perf_counter() - _BEGAN)
