"""Everything that the report shows: house style of the figures, and results with their provenance.

The only module that writes to ``results/``. A result is one JSON with the keys ``params``, ``values``, ``provenance``,
and its raw rows as CSV beside it.
"""

import csv
import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
import torch

from .bench import acceptance
from .data import write_json
from .train import has_bf16

_PALETTE = sns.color_palette("colorblind")
COLORS = {  # one meaning, one colour, everywhere
    "target": _PALETTE[0],
    "draft": _PALETTE[1],
    "speculative": _PALETTE[2],
    "rejected": _PALETTE[3],
    "small": _PALETTE[1],
    "medium": _PALETTE[4],
    "lookup": _PALETTE[5],
    "small distilled": _PALETTE[2],
    "small control": "0.6",
    "medium distilled": _PALETTE[6],
    "unused": "0.88",
    "theory": "0.3",
}
THEORY = {"color": COLORS["theory"], "linestyle": "--", "marker": ""}
ROOT = Path(__file__).resolve().parent.parent
_CELL = {"value": None, "ci95": None, "k": None}
_BOTH = {"T0": _CELL, "T1": _CELL}
HEADLINE = {  # the figures that the README quotes; null until measured
    "speedup": _BOTH,
    "speedup_distilled": _BOTH,
    "speedup_block": {"T1": _CELL},  # the block rule, which at temperature 0 decides the same
    "speedup_distilled_block": {"T1": _CELL},
    "tokens_per_second": {"A": None, "B": None, "C": None},
    "alpha": _BOTH,  # accepted ÷ examined where the speed-up is measured
    "alpha_distilled": _BOTH,
    "alpha_control": _BOTH,
    "tokens_per_round": {"T0": None, "T1": None},
    "tokens_per_round_distilled": {"T0": None, "T1": None},
    "c": None,
    "v5": None,
    "v9": None,
    "o": None,
    "prediction": {"sweep": None, "fresh": None},
    "roofline_fraction": None,
    "aa": {"T0": None, "T1": None},
    "lossless": {"checks": None, "failed": None, "mistakes": None, "controls": None, "controls_rejected": None},
    "provenance": None,  # of all but lossless and roofline, which files of their own have
}


def style() -> None:
    """Put the house style in force; call it once per notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (7, 3.6), "figure.dpi": 96,
        "savefig.facecolor": "white", "legend.frameon": False, "svg.hashsalt": "specdec", "lines.linewidth": 1.8,
        "axes.titlesize": "medium", "figure.constrained_layout.use": True,
    })  # fmt: skip


def results_dir() -> Path:
    """Where results go: $SPECDEC_RESULTS, else ``results/`` of the repository."""
    return Path(os.environ.get("SPECDEC_RESULTS") or ROOT / "results")


def record(
    profile: str,
    experiment: str,
    *,
    params: dict,
    values: dict,
    rows: list[dict] | None = None,
    seed: int | None = None,
    seconds: float | None = None,
) -> Path:
    """Write ``results/<profile>/<experiment>.json``, and ``rows`` as CSV beside it; NaN becomes null."""
    folder = results_dir() / profile
    folder.mkdir(parents=True, exist_ok=True)
    content = {"params": params, "values": values, "provenance": provenance(profile, seed=seed, seconds=seconds)}
    if rows:
        fields = list(dict.fromkeys(key for row in rows for key in row))
        text = StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write_text(folder / f"{experiment}.csv", text.getvalue())
    path = folder / f"{experiment}.json"
    write_json(path, _plain(content))
    return path


def load(profile: str, experiment: str) -> dict:
    """What `record` wrote; ValueError if that experiment has not been run."""
    path = results_dir() / profile / f"{experiment}.json"
    if not path.exists():
        raise ValueError(f"results/{profile}/{experiment}.json is not there; run `make reproduce PROFILE={profile}`.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        message = f"results/{profile}/{experiment}.json is damaged; run `make reproduce PROFILE={profile}` to write it again."
        raise ValueError(message) from error


def load_rows(profile: str, experiment: str) -> list[dict]:
    """The CSV beside a result, numbers as floats."""
    path = results_dir() / profile / f"{experiment}.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def color_of(drafter: str) -> str | tuple:
    """The colour of a drafter's curve; one that the report does not know is black."""
    return COLORS.get(drafter, "black")


def fresh_acceptance(rows: list[dict], drafter: str, temperature: float, k: int) -> dict:
    """`acceptance` of a drafter on the fresh prompts, from the rows of a recorded benchmark."""
    mine = [row for row in rows if (row["part"], row["temperature"]) == ("final", temperature)]
    return acceptance(mine, f"C {drafter} k={k}")


def break_even(axis, vertical: bool = False) -> None:
    """A thin line at 1, with its name outside, where no curve runs through it."""
    (axis.axvline if vertical else axis.axhline)(1, color="0.5", linewidth=0.8)
    place = {"xy": (1, 1), "textcoords": "offset points", "fontsize": 8, "color": "0.4"}
    if vertical:
        axis.annotate("break-even", xycoords=("data", "axes fraction"), xytext=(0, 2), ha="center", va="bottom", **place)
    else:
        axis.annotate("break-\neven", xycoords=("axes fraction", "data"), xytext=(4, 0), ha="left", va="center", **place)


def save_figure(figure, profile: str, name: str) -> Path:
    """``results/<profile>/<name>.png``, the same bytes for the same picture."""
    path = results_dir() / profile / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


def update_headline(profile: str, origin: dict | None = None, **values) -> Path:
    """Merge ``values`` into ``headline.json``, and the provenance ``origin`` if it is given; what is not known yet stays null.
    ValueError for an unknown key."""
    path = results_dir() / profile / "headline.json"
    current = HEADLINE | (json.loads(path.read_text()) if path.exists() else {})
    unknown = set(values) - set(HEADLINE)
    if unknown:
        raise ValueError(f"the headline has no {', '.join(sorted(unknown))}; its keys are {', '.join(HEADLINE)}.")
    current |= _plain(values) | ({} if origin is None else {"provenance": origin})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {key: current[key] for key in HEADLINE})
    return path


def provenance(profile: str, *, seed: int | None = None, seconds: float | None = None) -> dict:
    """What someone needs to judge or repeat a number; no paths, no host names."""

    def git(*command):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # there is none
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "tiktoken", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    changed = git("status", "--porcelain", "--", "specdec", "notebooks", "requirements.lock")
    return {
        "profile": profile,
        "commit": os.environ.get("SPECDEC_COMMIT") or git("rev-parse", "--short=12", "HEAD"),  # the first for a copied tree
        "dirty": None if changed is None else bool(changed),
        "machine": machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": has_bf16(),
        "versions": versions,
        "seed": seed,
        "seconds": seconds,
    }


def machine() -> str:
    """The processor's name, and the accelerator's if there is one."""
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def record_proof(profile: str, rows: list[dict], *, params: dict, seconds: float | None = None) -> Path:
    """``lossless.json`` and its CSV: the table of every check and of every mistake that must not pass for right.

    A row has ``kind`` "check" (its figure has to stay within the bound) or "control" (it has to exceed it), ``name``,
    ``what`` the figure is, ``figure``, ``bound`` and, where it applies, ``n`` things looked at.
    """
    checks, _, controls = kinds_of(rows)
    update_headline(profile, lossless={
        "checks": len(checks),
        "failed": sum(r["figure"] > r["bound"] for r in checks),
        "mistakes": len(mistakes_of(controls)),
        "controls": len(controls),
        "controls_rejected": sum(r["figure"] > r["bound"] for r in controls),
    })  # fmt: skip
    return record(profile, "lossless", params=params, values={"table": rows}, rows=rows, seconds=seconds)


# figures of the χ² test itself, which no engine could change
OF_TESTS = (
    "false alarms at a level of one in a thousand", "share that was missed", "probability of a false alarm",
    "total variation between cells that would be caught with probability .99", "mass of ids that share a cell",
)  # fmt: skip


def kinds_of(table: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """The rows of a proof: figures that judge the engine, figures that say how sharp the counting is, and controls."""
    checks, controls = ([r for r in table if r["kind"] == kind] for kind in ("check", "control"))
    return [r for r in checks if r["what"] not in OF_TESTS], [r for r in checks if r["what"] in OF_TESTS], controls


def mistakes_of(controls: list[dict]) -> set[str]:
    """The mistakes among the controls, each once: where one was tried stands in brackets behind its name, and a target that is
    off tries what a test can see."""
    return {r["name"].split(" (")[0] for r in controls if not r["name"].startswith("a target off")}


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it finds the old text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _plain(value):
    """JSON's own types; numbers that JSON lacks become null, long decimals six digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text
