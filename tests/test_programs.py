"""Programs on disk: whole or not there, and without the weights they were compiled with."""

import pytest
import torch
from conftest import needs_compiler
from torch import nn

from specdec import programs
from specdec.programs import Program, program_path


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.full((3,), factor), requires_grad=False)

    def forward(self, x):
        return (x * self.factor).sum(-1)


def inputs():
    return (torch.ones(4, 3),)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path))


@needs_compiler
def test_a_program_is_compiled_once_and_borrows_its_weights(monkeypatch):
    shapes = ({0: torch.export.Dim("rows", min=2, max=9)},)
    double = Scale(2.0)
    program = Program("scale", "parts", double, inputs, shapes)
    assert program(torch.ones(4, 3))[0].tolist() == [6] * 4
    double.factor.fill_(5)
    assert program(torch.ones(2, 3))[0].tolist() == [15] * 2
    monkeypatch.setattr(programs, "build", None)  # from now on nothing may be compiled
    assert Program("scale", "parts", Scale(1.0), inputs, shapes)(torch.ones(3, 3))[0].tolist() == [3] * 3
    with pytest.raises(TypeError):
        Program("scale", "other parts", double, inputs, shapes)


def test_a_build_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def half(exported, *, package_path, **_):
        with open(package_path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", half)
    with pytest.raises(KeyboardInterrupt):
        Program("scale", "parts", Scale(2.0), inputs)
    assert not list((tmp_path / "programs").iterdir())


def test_whatever_changes_the_code_changes_its_name(monkeypatch):
    paths = {program_path("a", 1), program_path("a", 2), program_path("b", 1), program_path("a", 1, 7)}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert len(paths | {program_path("a", 1)}) == 5
