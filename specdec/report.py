"""Everything that the report shows: house style of the figures, results with provenance, the README's numbers.

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

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
import torch

from .bench import acceptance
from .data import write_json

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
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PROOF_BEGIN, PROOF_END = "<!-- lossless:begin -->", "<!-- lossless:end -->"
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
        _write_text(folder / f"{experiment}.csv", text.getvalue())
    path = folder / f"{experiment}.json"
    write_json(path, _plain(content))
    return path


def load(profile: str, experiment: str) -> dict:
    """What `record` wrote; ValueError if that experiment has not been run."""
    path = results_dir() / profile / f"{experiment}.json"
    if not path.exists():
        raise ValueError(f"results/{profile}/{experiment}.json is not there; run `make reproduce PROFILE={profile}`.")
    return json.loads(path.read_text())


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
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
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
        "bf16": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
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


def readme_block() -> str:
    """The README's results, made from ``results/`` and nothing else."""
    parts = []
    for profile, label in (("cpu", "`cpu` profile, two CPU cores"), ("seed", "`seed` profile, the seed's sizes")):
        path = results_dir() / profile / "headline.json"
        parts.append(f"### {label}\n")
        if not path.exists():
            parts.append("Not measured yet.\n")
            continue
        parts.append(_origin(profile))
        parts.append(_headline_tables(HEADLINE | json.loads(path.read_text()), _data_type(profile)))
        parts.append(_caveat(profile))
        for name, caption in (("headline", ""), (_experiment(profile), "Points: the sweep over k, with its intervals; dashed: predicted.\n")):
            if (results_dir() / profile / f"{name}.png").exists():
                parts.append(f"![{name} figure](results/{profile}/{name}.png)\n")
                parts.append(caption)
        parts.append(_other_run(profile))
        parts.append(_drafts_table(profile))
        parts.append(_elsewhere_table(profile))
        parts.append(_accelerator_table(profile))
        parts.append(_peers_table(profile))
        parts.append(_recipes_table(profile))
        parts.append(_losing_cells(profile))
    return "\n".join(part for part in parts if part)


def write_readme(path: Path = ROOT / "README.md") -> None:
    """Replace what stands between the markers of the README; leaves the file alone when nothing changed."""
    text = path.read_text()
    new = with_block(with_block(text, readme_block()), proof_block(), PROOF_BEGIN, PROOF_END)
    if new != text:
        _write_text(path, new)


def with_block(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"the README lacks the markers {begin} and {end}; put them where the results belong.")
    return f"{head}{begin}\n{block}{end}{tail}"


def record_proof(profile: str, rows: list[dict], *, params: dict, seconds: float | None = None) -> Path:
    """``lossless.json`` and its CSV: the table of every check and of every mistake that must not pass for right.

    A row has ``kind`` "check" (its figure has to stay within the bound) or "control" (it has to exceed it), ``name``,
    ``what`` the figure is, ``figure``, ``bound`` and, where it applies, ``n`` things looked at.
    """
    checks, controls = ([r for r in rows if r["kind"] == kind] for kind in ("check", "control"))
    update_headline(profile, lossless={
        "checks": len(checks),
        "failed": sum(r["figure"] > r["bound"] for r in checks),
        "mistakes": len(_mistakes(controls)),
        "controls": len(controls),
        "controls_rejected": sum(r["figure"] > r["bound"] for r in controls),
    })  # fmt: skip
    return record(profile, "lossless", params=params, values={"table": rows}, rows=rows, seconds=seconds)


def _mistakes(controls: list[dict]) -> set[str]:
    """The mistakes among the controls, each once: where one was tried stands in brackets behind its name, and a target that is
    off tries what a test can see."""
    return {r["name"].split(" (")[0] for r in controls if not r["name"].startswith("a target off")}


def proof_block(profile: str = "cpu") -> str:
    """The README's paragraph on losslessness, made from ``lossless.json``."""
    try:
        table = load(profile, "lossless")["values"]["table"]
    except (ValueError, KeyError):
        return "Not recorded yet: `make proof` does it.\n"
    checks, controls = ([r for r in table if r["kind"] == kind] for kind in ("check", "control"))
    failed, passed = sum(r["figure"] > r["bound"] for r in checks), sum(r["figure"] <= r["bound"] for r in controls)
    lines = [
        f"`make proof` found {failed or 'none'} of {len(checks)} figures outside its bound. "
        f"{len(_mistakes(controls))} deliberate mistakes were run through the same checks, some of them in several places, and beside "
        f"them targets that are off by what a test claims to see: of these {len(controls)} controls {passed or 'none'} passed unnoticed.",
        "",
        "| what was compared | figures | largest | bound | looked at |",
        "|---|---|---|---|---|",
    ]
    for what in dict.fromkeys(r["what"] for r in checks):
        mine = [r for r in checks if r["what"] == what]
        worst, n = max(mine, key=lambda r: r["figure"] - r["bound"]), sum(r["n"] or 0 for r in mine)
        count = f"{n:,}" if n else ""
        lines.append(f"| {what} | {len(mine)} | {_short(worst['figure'])} | {_short(worst['bound'])} | {count} |")
    lines += ["", "| deliberate mistake | rejected by | figure | bound |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['what']} | {_short(r['figure'])} | {_short(r['bound'])} |" for r in controls]
    return "\n".join([*lines, ""])


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 or abs(value) >= 1e6 else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _data_type(profile: str) -> str:
    """In what numbers the models decoded, as the roofline found them; empty if it was not measured."""
    try:
        return f", weights in {load(profile, 'roofline')['values']['steps'][0]['dtype']}"
    except (ValueError, KeyError):
        return ""


def _other_run(profile: str) -> str:
    """What the draft as trained reached in the run of notebook 06, which is not the table's; empty if there was none."""
    best = (_finished(profile, "benchmark") or {"values": {}})["values"].get("best", {})
    lines = {t: best.get(f"small T={t}") for t in (0, 1)}
    if not all(lines.values()) or not (results_dir() / profile / "benchmark_distilled.json").exists():
        return ""
    speeds = " and ".join(f"{_speed(line)} at temperature {t} (k = {line['k']})" for t, line in lines.items())
    return (
        f"Table and figure are of notebook 07, where all small drafts ran in turns. In notebook 06, minutes before, the draft as "
        f"trained reached {speeds}: two runs may differ by more than the intervals, which know the prompts but not "
        "the machine's moods.\n"
    )


def _experiment(profile: str) -> str:
    """The benchmark that the profile's headline is of: its own, unless a cut run left only a part of it, else the one on two
    cores of models trained elsewhere."""
    return "benchmark_two_cores" if _finished(profile, "benchmark") is None else "benchmark"


def _finished(profile: str, experiment: str) -> dict | None:
    try:
        result = load(profile, experiment)
    except ValueError:
        return None
    return None if result["params"].get("unfinished") else result


def _origin(profile: str) -> str:
    """What an unattended run trained, on what; empty for a profile whose notebooks tell it."""
    try:
        training, roofline, measured = load(profile, "training"), load(profile, "roofline"), load(profile, _experiment(profile))
        data, trained_on = roofline["params"]["data"], training["provenance"]["machine"]
    except (ValueError, KeyError):
        return ""
    lines = [
        f"Trained on {trained_on}: {data['tokens'] / 1e6:.1f}M tokens of {data['source']} (sha256 of the tokens {data['sha256'][:12]}…), "
        "all of GPT-2's ids, and schedules cut to the time there was.", "",
        "| model | weights | tokens read | seconds | TFLOP/s | validation loss |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for role, v in training["values"].items():
        tokens = training["params"][role]["tokens"]
        lines.append(f"| {role} | {v['weights'] / 1e6:.1f}M | {tokens / 1e6:.1f}M | {v['seconds']:.0f} | {v['flops'] / 1e12:.0f} "
                     f"| {v['validation_loss']:.3f} |")  # fmt: skip
    distilled = (_finished(profile, "distillation") or {"params": {}})["params"]
    if distilled.get("texts") == "data+target":
        lines += ["", f"A distilled draft read {distilled['tokens'] / 1e6:.1f}M tokens more, in its last phase "
                  f"({distilled.get('divergence', 'forward-kl')}) also what the target itself writes at both temperatures "
                  f"({distilled['own_text'] / 1e6:.1f}M tokens of it); the control as many of the data's."]  # fmt: skip
    if _experiment(profile) != "benchmark":
        n, weights = measured["params"]["n_prompts"], measured["params"].get("weights")
        lines += ["", f"The same models{f', their weights {weights}' if weights else ''}, **measured on two CPU cores** with {n} "
                  "held-out prompts (on the GPU itself C ÷ A is not measured yet):"]  # fmt: skip
    return "\n".join([*lines, ""])


def _commit(origin: dict) -> str:
    """The commit of a result, and whether the code was exactly that."""
    return f"{origin['commit']}{ {False: '', True: ' with changes', None: ', perhaps with changes'}[origin['dirty']]}"


def _speed(line: dict | None) -> str:
    """A speed-up and its interval."""
    return f"{line['speedup']:.2f}× [{line['ci95_low']:.2f}, {line['ci95_high']:.2f}]" if line else "—"


def _drafts_table(profile: str) -> str:
    """Every draft of the benchmark at the k picked for it, where there are several."""
    result = _finished(profile, _experiment(profile))
    if result is None:
        return ""
    best, as_block = (result["values"].get(key, {}) for key in ("best", "as_block"))
    names = [name for key in best for name, _, temperature in [key.partition(" T=")] if temperature == "1" and "k" in best[key]]
    if len(names) < 2:
        return ""
    rows = load_rows(profile, _experiment(profile))

    def rate(name, t):
        value = fresh_acceptance(rows, name, t, best[f"{name} T={t}"]["k"])
        return f"{value['value']:.2f} [{value['ci95'][0]:.2f}, {value['ci95'][1]:.2f}]"

    which = "Notebook 06, all" if _other_run(profile) else "All"
    lines = [f"{which} drafts in the same turns, on the same fresh prompts:", "",
             "| draft | α, T = 0 | α, T = 1 | C ÷ A, T = 0 | C ÷ A, T = 1 | the same, judged as a block |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        rates = " | ".join(rate(name, t) for t in (0, 1))
        found = best.get(f"{name} T=0"), best.get(f"{name} T=1"), as_block.get(f"{name} T=1")
        speeds = " | ".join(_speed(line) + (f", k = {line['k']}" if line else "") for line in found)
        lines.append(f"| {name} | {rates} | {speeds} |")
    return "\n".join([*lines, ""])


def _elsewhere_table(profile: str) -> str:
    """The same models, measured in other ways or on another machine than the headline's."""
    lines = []
    for name, how in (("benchmark_eager", "eager"), ("benchmark_graphs", "CUDA graphs"), ("benchmark_two_cores", "two CPU cores")):
        result = _finished(profile, name)
        if result is None or name == _experiment(profile):
            continue
        best, by_block = result["values"]["best"], result["values"].get("as_block", {})
        cells = [
            table.get(f"{draft} T={t}") for draft in ("small", "small distilled") for table, t in ((best, 0), (best, 1), (by_block, 1))
        ]
        n_sweep = len({row["prompt"] for row in load_rows(profile, name) if row.get("part") == "sweep"})
        params, origin = result["params"], result["provenance"]
        how += f", distilled as in `{params['drafts']}.json`" if "drafts" in params else ""
        how += f"; {params['remark']}" if "remark" in params else ""
        lines.append(f"| {how} | {origin['machine']}, {_commit(origin)} | {params['n_prompts']} × {params['new_tokens']}, {n_sweep} "
                     f"| {best['target T=1']['tokens_per_second']:.0f} | {' | '.join(map(_speed, cells))} |")  # fmt: skip
    if not lines:
        return ""
    head = ["The same target otherwise, C ÷ A of the small draft at temperatures 0 and 1:", "",
            "| passes | machine, commit | texts × tokens, texts to choose k | A, tokens/s | as trained, 0 | 1 | 1, as a block | distilled, 0 | 1 "
            "| 1, as a block |", "|---" * 10 + "|"]  # fmt: skip
    return "\n".join([*head, *lines, ""])


def _accelerator_table(profile: str) -> str:
    """A step of each model on a GPU, in all the ways that passes can run; empty where there was none."""
    try:
        result = load(profile, "roofline")
        steps = [s for s in result["values"]["steps"] if s["sizes"] == profile]
    except (ValueError, KeyError):
        return ""
    if len({s["passes"] for s in steps}) < 2:
        return ""
    lines = [f"A decoding step, its draw included, on {result['provenance']['machine']}, {steps[0]['dtype']}:", "",
             "| passes | target, ms | of the floor that memory sets | v(5) | v(9) | small draft, ms | medium draft, ms |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    by_name = {(s["passes"], s["model"]): s for s in steps}
    for passes in dict.fromkeys(s["passes"] for s in steps):
        target, (small, medium) = by_name[passes, "target"], (
            f"{by_name[passes, role]['seconds'] * 1e3:.2f}" if (passes, role) in by_name else "—" for role in ("small", "medium")
        )  # fmt: skip
        lines.append(f"| {passes} | {target['seconds'] * 1e3:.2f} | {target['fraction']:.0%} | {target['v5']:.2f} | {target['v9']:.2f} "
                     f"| {small} | {medium} |")  # fmt: skip
    return "\n".join([*lines, ""])


def _headline_tables(h: dict, data_type: str = "") -> str:
    def speed(cell):
        if cell["value"] is None:
            return "not measured yet"
        return f"**{cell['value']:.2f}×** [{cell['ci95'][0]:.2f}, {cell['ci95'][1]:.2f}], k = {cell['k']}"

    def number(value, digits=2):
        return "not measured yet" if value is None else f"{value:.{digits}f}"

    def interval(cell, digits=2):
        return "not measured yet" if not cell or cell["value"] is None else (
            f"{cell['value']:.{digits}f} [{cell['ci95'][0]:.{digits}f}, {cell['ci95'][1]:.{digits}f}]")  # fmt: skip

    def pair(key, show):
        return f"{show(h[key]['T0'])} | {show(h[key]['T1'])}"

    def errors(found):
        return "not measured yet" if not found else (
            f"R² = {number(found['r2'])}, {found['mean_error']:+.0%} on average, {found['within']} of {found['n']} within the interval")  # fmt: skip

    seconds, lossless = h["tokens_per_second"], h["lossless"]
    lines = [
        "| | temperature 0 | temperature 1 |",
        "|---|---|---|",
        f"| speed-up C ÷ A, small draft as trained | {speed(h['speedup']['T0'])} | {speed(h['speedup']['T1'])} |",
        f"| the same, drafts judged as a block | as above: both rules agree | {speed(h['speedup_block']['T1'])} |",
        f"| speed-up C ÷ A, small draft distilled | {speed(h['speedup_distilled']['T0'])} "
        f"| {speed(h['speedup_distilled']['T1'])} |",
        f"| the same, drafts judged as a block | as above: both rules agree | {speed(h['speedup_distilled_block']['T1'])} |",
        f"| α, as trained | {pair('alpha', interval)} |",
        f"| α, distilled | {pair('alpha_distilled', interval)} |",
        f"| α, control: equal extra steps of cross-entropy | {pair('alpha_control', interval)} |",
        f"| tokens per round, as trained | {pair('tokens_per_round', number)} |",
        f"| tokens per round, distilled | {pair('tokens_per_round_distilled', number)} |",
        f"| the target against itself, A ÷ A | {pair('aa', lambda cell: interval(cell, 3))} |",
        "",
        f"Tokens per second at temperature 1, draft as trained: A (target alone) {number(seconds['A'], 0)}, B (draft alone) "
        f"{number(seconds['B'], 0)}, C (both) {number(seconds['C'], 0)}. In units of one target step, timed beside the sweep over k: "
        f"draft step c = {number(h['c'], 3)}, verifying 5 rows v(5) = {number(h['v5'])}, 9 rows v(9) = {number(h['v9'])}, the "
        f"decision o = {number(h['o'], 3)}. (c is less than A ÷ B, since B draws one token a call, and C all drafts of a round.)",
        "",
        f"Speed-up predicted from costs and acceptance against measured: in the sweep, which both come from, "
        f"{errors(h['prediction']['sweep'])}; on the fresh prompts {errors(h['prediction']['fresh'])}.",
        "",
    ]
    if lossless["checks"] is not None:
        lines += [
            f"Losslessness: {lossless['checks']} checks, {lossless['failed']} failed; {lossless['mistakes']} deliberate mistakes in "
            f"{lossless['controls']} controls, {lossless['controls_rejected']} of them rejected.",
            "",
        ]
    if h["provenance"]:
        p = h["provenance"]
        lines += [f"Measured on {p['machine']}, {p['threads']} threads, torch {p['versions']['torch']}{data_type}, commit {_commit(p)}.", ""]
    return "\n".join(lines)


def _caveat(profile: str) -> str:
    """Greedy decoding falls into loops that any draft can follow: say how much the texts repeat themselves."""
    try:
        best = load(profile, _experiment(profile))["values"]["best"]
        distinct = [best[f"target T={t}"]["distinct_fraction"] for t in (0, 1)]
        held_out = load(profile, "distillation")["values"]["alpha_held_out"]
    except (ValueError, KeyError):
        return ""
    rates = ", ".join(f"{held_out[name]['T0']:.2f} and {held_out[name]['T1']:.2f} {name}" for name in held_out)
    return (
        f"At temperature 0 these small models repeat themselves ({distinct[0]:.0%} of a text's tokens are distinct, "
        f"{distinct[1]:.0%} at temperature 1), and a draft that follows a loop is easily right: the left column flatters. "
        f"On held-out text α at temperatures 0 and 1 is {rates}.\n"
    )


def _peers_table(profile: str) -> str:
    """Ours and transformers' on the same weights, each at its best setting."""
    try:
        peers = load(profile, "peers")
    except ValueError:
        return ""
    cells = {(c["arm"].split(" k=")[0].removesuffix(" static cache"), c["temperature"]): c
             for c in peers["values"]["cells"] if c["part"] == "final"}  # fmt: skip
    ratios, version = peers["values"]["ours_by_theirs"], peers["params"]["transformers"]
    lines = [
        f"The same weights in transformers {version}, in turns with ours, each side at its best setting "
        f"({peers['params']['draft']} draft, {peers['provenance']['machine']}, commit {peers['provenance']['commit']}; `make peers`):", "",
        "| | temperature | ours, tokens/s | transformers, tokens/s | ours ÷ theirs |", "|---|---|---|---|---|",
    ]  # fmt: skip
    names = {"alone": "target alone", "draft": "with the draft", "lookup": "prompt lookup"}
    for kind, by_temperature in ratios.items():
        for key, ratio in by_temperature.items():
            t = float(key.removeprefix("T"))
            ours, theirs = (cells[f"{side} {kind}", t]["tokens_per_second"] for side in ("ours", "transformers"))
            lines.append(f"| {names[kind]} | {t:g} | {ours:.0f} | {theirs:.0f} "
                         f"| {ratio['value']:.2f}× [{ratio['ci95'][0]:.2f}, {ratio['ci95'][1]:.2f}] |")  # fmt: skip
    return "\n".join([*lines, ""])


def _recipes_table(profile: str) -> str:
    rows = load_rows(profile, "recipes")
    if not rows:
        return ""
    columns = [name for name in rows[0] if "T =" in name]
    lines = ["What a draft may learn from, in equal steps, and the α that it reaches (`make distill`):", "",
             "| recipe | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    lines += [f"| {row['recipe']} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _losing_cells(profile: str) -> str:
    """Of the sweeps over k, and of each drafter at the k picked, when it was measured again."""
    measured = load_rows(profile, f"{_experiment(profile)}_cells") + load_rows(profile, "benchmark_distilled_cells")
    measured = [c for c in measured if isinstance(c.get("k"), float)]
    if not measured:
        return ""
    for key, line in load(profile, _experiment(profile))["values"]["best"].items():
        if "k" in line:
            draft, temperature = key.split(" T=")
            measured.append(line | {"draft": f"{draft}, once more on fresh prompts", "temperature": float(temperature)})
    for key, line in load(profile, _experiment(profile))["values"].get("as_block", {}).items():
        draft, temperature = key.split(" T=")
        measured.append(line | {"draft": f"{draft}, judged as a block", "temperature": float(temperature)})
    losing = [c for c in measured if c["speedup"] < 1]
    lines = [f"Cells in which speculation loses: {len(losing)} of {len(measured)}.", ""]
    if losing:
        lines += ["| draft | temperature | k | speed-up |", "|---|---|---|---|"]
        lines += [f"| {c['draft']} | {c['temperature']:g} | {c['k']:g} | {c['speedup']:.2f}× |" for c in losing]
        lines.append("")
    return "\n".join(lines)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
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


if __name__ == "__main__":
    matplotlib.use("agg")
    write_readme()
