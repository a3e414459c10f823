"""pyproject.toml, requirements.lock and environment.yml name the same versions; modules import downwards only."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONDA = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    return {normal(m[1]): m[2] for m in (re.match(r"\s*-?\s*([A-Za-z0-9_.-]+)={1,2}([0-9][\w.]*)$", line) for line in lines) if m}


def declared():
    return pins(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_every_dependency_is_pinned_exactly():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(declared()) == len(listed) == len({normal(d.split("=")[0]) for d in listed})


def test_the_lock_holds_them():
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    assert declared().items() <= lock.items()
    assert len(lock) == sum(1 for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


def test_conda_users_get_the_same_versions():
    text = (ROOT / "environment.yml").read_text()
    conda = {normal(CONDA.get(name, name)): v for name, v in pins(text.splitlines()).items() if name != "python"}
    assert conda == declared()
    assert "conda-forge" in text and "defaults" not in text.replace("nodefaults", "") and "- -e ." in text


LAYERS = [
    {"theory", "sampling", "data"}, {"model"}, {"checkpoint", "profiles"}, {"train", "export"}, {"passes", "native"},
    {"compiled", "cuda"}, {"inference"}, {"distill"}, {"drafting"}, {"engine"}, {"prediction"}, {"bench"},
    {"report", "notebooks", "peers", "roofline"}, {"readme", "reproduce"}, {"__main__"},
]  # fmt: skip


def test_a_module_imports_only_from_below():
    allowed = set()
    for layer in LAYERS:
        for name in layer:
            tree = ast.parse((ROOT / "specdec" / f"{name}.py").read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    imported = {node.module} if node.module else {alias.name for alias in node.names}
                    assert imported <= allowed, f"{name} imports {imported - allowed}"
        allowed |= layer
    assert {p.stem for p in (ROOT / "specdec").glob("*.py")} - {"__init__"} == allowed


def test_no_paths_of_one_machine_in_results():
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in (".json", ".csv"):
            assert not re.search(r"/(home|root|work|Users|tmp)/", path.read_text()), path.name
