import pytest
import torch

from specdec import roofline
from specdec.__main__ import main
from specdec.inference import ready
from specdec.model import Transformer
from specdec.profiles import get_profile


def test_bytes_of_the_seed_s_models():
    """The figures of the architecture: 247 MB for a token of the target in bf16, the cache aside 226."""
    seed = get_profile("seed").models
    millions = {name: round(roofline.bytes_per_token(config, 0) / 2e6, 1) for name, config in seed.items()}
    assert millions == {"target": 113.0, "small": 14.3, "medium": 42.3}
    target = seed["target"]
    cache = roofline.bytes_per_token(target, 1000) - roofline.bytes_per_token(target, 0)
    assert cache == 1000 * 2 * 2 * 12 * 3 * 64  # 2 bytes, keys and values, layers, heads, head size


def test_steps_and_their_floor(monkeypatch):
    monkeypatch.setattr(roofline, "reader", lambda device: lambda: 1e9)
    profile = get_profile("ci")
    models = {name: ready(Transformer(profile.models[name])) for name in ("target", "small")}
    steps = roofline.measure_steps(models, length=8, rows=(2, 5), repeats=3)
    assert [s.model for s in steps] == ["target", "small"]
    for s in steps:
        assert s.seconds > 0 and s.fraction == pytest.approx(s.bytes / 1e9 / s.seconds)
    assert set(steps[0].rows) == {2, 5} and not steps[1].rows  # a draft never verifies
    assert {"v2", "v5", "fraction"} <= set(roofline.as_rows(steps)[0])
    times = roofline.seconds_by_length(models["target"], [8, 100], repeats=2)
    assert set(times) == {8, 100} and min(times.values()) > 0


def test_a_step_s_floor_is_that_of_its_moment(monkeypatch):
    """Memory that is at times ten times as fast does not make a step ten times as far from its floor."""
    speeds = iter([1e9, 1e9, 1e10] * 100)
    monkeypatch.setattr(roofline, "reader", lambda device: lambda: next(speeds))
    models = {"target": ready(Transformer(get_profile("ci").models["target"]))}
    (step,) = roofline.measure_steps(models, length=8, rows=(2,), repeats=6)
    assert step.bandwidth == 1e9 and step.bandwidth_most == 1e10
    assert step.floor_seconds == step.bytes / 1e9


def test_bandwidth_is_that_of_a_machine():
    assert 1e8 < roofline.reader(megabytes=32)() < 1e13
    assert torch.get_num_threads() >= 1


def test_the_command_prints_a_line_for_every_model(monkeypatch, capsys):
    survey = roofline.survey
    monkeypatch.setattr(roofline, "survey", lambda profile, device: survey(profile, "ci", device=device))
    assert main(["bench", "--profile", "ci", "--roofline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GB/s" in lines[0] and [line.split()[1] for line in lines[2:]] == ["target", "small", "medium"]
