"""What keeps the notebooks honest: checked parameters, committed outputs, house rules."""

import ast
import base64
import re
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from specdec.notebooks import main, parameters, refresh, run, smaller

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NOTEBOOKS = [pytest.param(nbformat.read(p, as_version=4), id=p.stem) for p in PATHS]


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", ())]


def test_there_are_seven():
    assert [p.stem[:2] for p in PATHS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_parameter_is_read(notebook):
    """Papermill goes on when a name is unknown, so a parameter that nobody reads would never be noticed."""
    names = parameters(notebook)
    assert "profile" in names and names["profile"] is None
    cell = tagged(notebook, "parameters")[0]
    later = code(notebook)[code(notebook).index(cell) + 1 :]
    read = {n.id for c in later for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert set(names) <= read


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_house_rules(notebook):
    cells = code(notebook)
    assert 25 <= len(notebook.cells) <= 45
    assert max(len(c.source.splitlines()) for c in cells) <= 30
    assert len(tagged(notebook, "nbval-check-output")) >= 4
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    order = ["# 0", "\n> ", "**Needs**", "## A worked example", "in full", "## Where it breaks", "real", "## What we checked",
             "## Exercises"]  # fmt: skip
    places = [text.find(word) for word in order]
    assert -1 not in places and places[:6] == sorted(places[:6]) and places[-2:] == sorted(places[-2:])


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_outputs_are_committed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000
    counts = [c.execution_count for c in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run `make reproduce refresh`: a cell without a count is never compared"
    outputs = [o for c in code(notebook) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "papermill" not in notebook.metadata
    for output in outputs:
        text = output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r"(^|[\s'\"])/(home|root|work|Users|tmp)/", text)


def small_notebook(path, source="profile = None\nk = 2"):
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata["tags"] = ["parameters"]
    cells = [cell, nbformat.v4.new_code_cell("print(k)\nif k == 13:\n    raise SystemError('bad luck')")]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def test_an_unknown_parameter_is_refused(tmp_path, capsys):
    small_notebook(tmp_path / "a.ipynb")
    assert main(["run", str(tmp_path / "a.ipynb"), str(tmp_path / "out.ipynb"), "kk=3"]) == 2
    assert "has no parameter kk; it has profile, k" in capsys.readouterr().err
    assert not (tmp_path / "out.ipynb").exists()


def test_parameters_are_plain_literals(tmp_path):
    small_notebook(tmp_path / "a.ipynb", "profile = None\nk = max(1, 2)")
    with pytest.raises(ValueError):
        parameters(nbformat.read(tmp_path / "a.ipynb", as_version=4))


def test_a_run_that_fails_leaves_nothing_that_looks_finished(tmp_path):
    small_notebook(tmp_path / "a.ipynb")
    run(tmp_path / "a.ipynb", tmp_path / "good.ipynb", {"k": "5"})
    done = nbformat.read(tmp_path / "good.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "5\n"
    with pytest.raises(Exception, match="bad luck"):
        run(tmp_path / "a.ipynb", tmp_path / "bad.ipynb", {"k": "13"})
    assert not (tmp_path / "bad.ipynb").exists()


def test_refresh_copies_outputs_and_no_traces(tmp_path):
    source, executed = tmp_path / "source", tmp_path / "executed"
    source.mkdir()
    small_notebook(source / "a.ipynb")
    run(source / "a.ipynb", executed / "a.ipynb", {"k": "5"})
    (tmp_path / "proved").touch()
    refresh(executed, source)
    times = [path.stat().st_mtime_ns for path in (source / "a.ipynb", executed / "a.ipynb", tmp_path / "proved")]
    assert times[0] <= times[1] == times[2]  # make runs none of them again
    notebook = nbformat.read(source / "a.ipynb", as_version=4)
    assert notebook.cells[1].outputs[0].text == "5\n" and len(notebook.cells) == 2
    assert [c.execution_count for c in notebook.cells] == [1, 2]
    assert "papermill" not in notebook.metadata and "papermill" not in notebook.cells[1].metadata
    notebook.cells[1].source = "print(k + 1)"
    nbformat.write(notebook, source / "a.ipynb")
    with pytest.raises(ValueError, match="has changed since"):
        refresh(executed, source)


def test_inline_figures_shrink_and_stay_the_same_picture():
    from PIL import Image

    figure, axis = plt.subplots(figsize=(4, 3))
    axis.plot([1, 3, 2], "o-")
    axis.set(xlabel="x", ylabel="y")
    raw = BytesIO()
    figure.savefig(raw, format="png")
    plt.close(figure)
    before = base64.b64encode(raw.getvalue()).decode()
    after = smaller(before)
    assert len(after) < len(before) and len(smaller(after)) <= len(after)
    a, b = (np.asarray(Image.open(BytesIO(base64.b64decode(x))).convert("RGB")).astype(int) for x in (before, after))
    assert a.shape == b.shape and np.abs(a - b).mean() < 1
