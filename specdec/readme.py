"""The README's numbers: what stands between its markers is made from ``results/`` and nothing else.

Three blocks: the headline, the sentence on losslessness, and all the numbers with every cell in which speculation loses.
"""

import json
import statistics
from pathlib import Path

from .report import HEADLINE, ROOT, fresh_acceptance, kinds_of, load, load_rows, mistakes_of, results_dir, write_text

PROFILES = {"cpu": "`cpu` profile, two CPU cores", "seed": "`seed` profile, the seed's sizes"}


def write(path: Path = ROOT / "README.md") -> None:
    """Replace what stands between the markers of the README; leaves the file alone when nothing changed."""
    text = path.read_text()
    new = with_blocks(text)
    if new != text:
        write_text(path, new)


def with_blocks(text: str) -> str:
    """``text`` with each block put between its markers, ``<!-- name:begin -->`` and ``<!-- name:end -->``; ValueError if it
    lacks some."""
    for name, block in {"headline": headline, "lossless": lossless, "numbers": numbers}.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the README lacks the markers {begin} and {end}; put them where the {name} belongs.")
        text = f"{before}{begin}\n{block()}{end}{after}"
    return text


def headline() -> str:
    """The speed-ups of every profile that was measured, and what to know before believing them."""
    lines, asides = [], []
    for profile in PROFILES:
        h = _headline_of(profile)
        if h is None or h["provenance"] is None:
            lines.append(f"| `{profile}` | | not measured yet | | |")
            continue
        for draft, key in (("as trained", "speedup"), ("distilled", "speedup_distilled")):
            cells = h[key]["T0"], h[key]["T1"], h[f"{key}_block"]["T1"]
            where = ", ".join(filter(None, (f"`{profile}`", h["provenance"]["machine"].split(", ")[-1], _data_type(profile))))
            lines.append(f"| {where} | {draft} | {' | '.join(map(_bold, cells))} |")
            name = "small" if key == "speedup" else "small distilled"
            lines += _in_other_processes(profile, name) + _on_the_first_machine(profile, name)
        cells, (a, b, c) = _cells(profile), (h["tokens_per_second"][arm] or 0 for arm in "ABC")
        asides.append(
            f"- `{profile}`{_sizes(profile)}: at T = 1 the target alone writes {a:,.0f} tokens a second, the draft as trained alone "
            f"{b:,.0f}, both together {c:,.0f}. The target against itself, A ÷ A, is {_interval(h['aa']['T0'], 3)} at "
            f"T = 0 and {_interval(h['aa']['T1'], 3)} at T = 1. Speculation loses in "
            f"{sum(cell['speedup'] < 1 for cell in cells)} of {len(cells)} cells of drafter, T and k."
            + _again(profile)
        )
    head = ["| models, machine | small draft | C ÷ A, T = 0 | C ÷ A, T = 1 | the same, judged as a block |", "|---" * 5 + "|"]
    return "\n".join([*head, *lines, "", *asides, "", _picture("cpu", "headline"), ""])


def numbers() -> str:
    """Everything that was measured, profile by profile, and the proof."""
    parts = []
    for profile, label in PROFILES.items():
        h = _headline_of(profile)
        parts.append(f"### {label}\n")
        if h is None:
            parts.append("Not measured yet.\n")
            continue
        parts += [_origin(profile), _recipe(profile), _headline_tables(h, profile), _caveat(profile)]
        picture = _picture(profile, "speedup_by_k") or _picture(profile, _experiment(profile))
        parts.append(f"{picture}\n\nPoints: the sweep over k, with its intervals; pale and dashed: predicted.\n" if picture else "")
        tables = _other_run, _runs_table, _drafts_table, _elsewhere_table, _accelerator_table, _peers_table, _recipes_table
        parts += [*(table(profile) for table in tables), _recipes_table(profile, "batches")]
        parts.append(_losing_cells(profile))
        parts += [
            _losing_cells(profile, f"benchmark_{file}_machine", where) for file, where in (
                ("first", " on the first machine"), ("distilled_first", " on the first machine, with drafts trained further"),
                ("second", " on the second machine"))
        ]  # fmt: skip
    return "\n".join(part for part in [*parts, "### The proof\n", _proof_tables()] if part)


def lossless(profile: str = "cpu") -> str:
    """One sentence on what `make proof` found."""
    table = _proof(profile)
    if not table:
        return "Not recorded yet: `make proof` does it.\n"
    checks, of_tests, controls = kinds_of(table)
    failed, passed = sum(r["figure"] > r["bound"] for r in checks), sum(r["figure"] <= r["bound"] for r in controls)
    return (
        f"`make proof` found {failed or 'none'} of {len(checks)} figures outside its bound ({len(of_tests)} more say how sharp its "
        "counting is). "
        f"{len(mistakes_of(controls))} deliberate mistakes were run through the same checks, some of them in several places, and beside "
        f"them targets that are off by what a test claims to see: of these {len(controls)} controls {passed or 'none'} passed unnoticed.\n"
    )


def _proof(profile: str) -> list[dict]:
    """The rows of `report.record_proof`; none if there was no proof."""
    try:
        return load(profile, "lossless")["values"]["table"]
    except (ValueError, KeyError):
        return []


def _proof_tables(profile: str = "cpu") -> str:
    table = _proof(profile)
    if not table:
        return lossless(profile)
    checks, of_tests, controls = kinds_of(table)
    lines = []
    for head, some in (("what was compared", checks), ("how sharp the counting is", of_tests)):
        lines += [f"| {head} | figures | largest | bound | looked at |", "|---" * 5 + "|"]
        for what in dict.fromkeys(r["what"] for r in some):
            mine = [r for r in some if r["what"] == what]
            worst, n = max(mine, key=lambda r: r["figure"] - r["bound"]), sum(r["n"] or 0 for r in mine)
            count = f"{n:,}" if n else ""
            lines.append(f"| {what} | {len(mine)} | {_short(worst['figure'])} | {_short(worst['bound'])} | {count} |")
        lines.append("")
    mistakes = ["| deliberate mistake | rejected by | figure | bound |", "|---" * 4 + "|"]
    mistakes += [f"| {r['name']} | {r['what']} | {_short(r['figure'])} | {_short(r['bound'])} |" for r in controls]
    return "\n".join([*lines, *_folded(f"{len(controls)} controls, and the figure that rejected each", mistakes)])


def _folded(title: str, table: list[str]) -> list[str]:
    """A long table behind its title, which a click opens."""
    return ["<details>", f"<summary>{title}</summary>", "", *table, "", "</details>", ""]


def _headline_of(profile: str) -> dict | None:
    path = results_dir() / profile / "headline.json"
    return HEADLINE | json.loads(path.read_text()) if path.exists() else None


def _sizes(profile: str) -> str:
    """How large the models are; empty if their training is not on file."""
    try:
        weights = {role: line["weights"] for role, line in load(profile, "training")["values"].items()}
        return f", a target of {weights['target'] / 1e6:.1f}M weights and a draft of {weights['small'] / 1e6:.1f}M"
    except (ValueError, KeyError):
        return ""


def _picture(profile: str, name: str) -> str:
    """The picture of that name, if there is one."""
    return f"![{name} figure](results/{profile}/{name}.png)" if (results_dir() / profile / f"{name}.png").exists() else ""


def _interval(cell: dict | None, digits: int = 2) -> str:
    if not cell or cell["value"] is None:
        return "not measured yet"
    return f"{cell['value']:.{digits}f} [{cell['ci95'][0]:.{digits}f}, {cell['ci95'][1]:.{digits}f}]"


def _bold(cell: dict) -> str:
    """A speed-up of the headline."""
    if cell["value"] is None:
        return "not measured yet"
    return f"**{cell['value']:.2f}×** [{cell['ci95'][0]:.2f}, {cell['ci95'][1]:.2f}], k = {cell['k']}"


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 or abs(value) >= 1e6 else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _data_type(profile: str) -> str:
    """In what numbers the models decoded, as the roofline found them; empty if it was not measured."""
    try:
        return load(profile, "roofline")["values"]["steps"][0]["dtype"]
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
        f"The table and the headline are of notebook 07, where all small drafts ran in turns. In notebook 06, minutes before, the draft as "
        f"trained reached {speeds}: two runs may differ by more than the intervals, which know the prompts but not "
        "the machine's moods.\n"
    )


def _in_other_processes(profile: str, draft: str) -> list[str]:
    """A line of the headline's table: the same cells, measured by other processes; none where there were none."""
    cells = []
    for temperature, rule in ((0, "token-wise"), (1, "token-wise"), (1, "block")):
        found = [row["speedup"] for row in load_rows(profile, "runs")
                 if (row["draft"], row["temperature"], row["rule"]) == (draft, temperature, rule)]  # fmt: skip
        cells.append(f"{statistics.median(found):.2f}× ({min(found):.2f} – {max(found):.2f})" if found else "—")
    runs = len({row["run"] for row in load_rows(profile, "runs")})
    return [f"| | in {runs} more processes{_where(profile)}: median (range) | {' | '.join(cells)} |"] if runs else []


def _on_the_first_machine(profile: str, draft: str) -> list[str]:
    """A line of the headline's table: the same on the machine that the profile was measured on before; none if there is none."""
    result = _finished(profile, "benchmark_distilled_first_machine")
    if result is None:
        return []
    best, as_block, origin = result["values"]["best"], result["values"]["as_block"], result["provenance"]
    cells = (f"{_speed(line)}, k = {line['k']}" for line in (best[f"{draft} T=0"], best[f"{draft} T=1"], as_block[f"{draft} T=1"]))
    return [f"| | {result['params']['remark']}, commit {_commit(origin)} | {' | '.join(cells)} |"]


def _again(profile: str) -> str:
    """How the headline's last cell goes with the speed of the target alone from process to process."""
    found = [row for row in load_rows(profile, "runs") if (row["draft"], row["rule"]) == ("small distilled", "block")]
    if not found:
        return ""
    found.sort(key=lambda row: row["target_alone"])
    least, most = found[0], found[-1]
    return (
        f" Of the further processes the distilled draft, judged as a block, was {least['speedup']:.2f} times as fast in the one where the "
        f"target alone wrote least, {least['target_alone']:.0f} tokens a second, and {most['speedup']:.2f} times where it wrote most, "
        f"{most['target_alone']:.0f}: the intervals do not know how fast memory is at the time."
    )


def _where(profile: str) -> str:
    """On what `make runs` ran, and by which code, where that is not what the headline is of."""
    runs, origin = load(profile, "runs"), _headline_of(profile)["provenance"]
    made = runs["provenance"]
    if origin and all(origin.get(key) == made.get(key) for key in ("machine", "bf16")):
        return "" if origin.get("commit") == made["commit"] else f" at commit {_commit(made)}"
    return f" on {made['machine'].split(', ')[-1]} with models trained there, in {runs['params']['decoded_in']}"


def _runs_table(profile: str) -> str:
    """How far the headline's speed-ups move from process to process; empty where it was not measured again."""
    rows = load_rows(profile, "runs")
    if not rows:
        return ""
    runs = len({row["run"] for row in rows})

    def spread(name, values, show):
        return f"| {name} | {' | '.join(show(v) for v in (min(values), statistics.median(values), max(values)))} |"

    lines = [f"The same arms and prompts in {runs} further processes{_where(profile)} (`make runs`):", "",
             "| | lowest | median | highest |", "|---" * 4 + "|"]  # fmt: skip
    for t in sorted({row["temperature"] for row in rows}):
        mine = [row for row in rows if row["temperature"] == t]
        lines.append(spread(f"target alone, T = {t:g}, tokens/s", [row["target_alone"] for row in mine], lambda v: f"{v:.0f}"))
        for arm in dict.fromkeys(row["arm"] for row in mine):
            cells = [row for row in mine if row["arm"] == arm]
            draft, rule, k = (cells[0][key] for key in ("draft", "rule", "k"))
            name = f"A ÷ A, T = {t:g}" if not draft else f"{draft}{', judged as a block' if rule == 'block' else ''}, T = {t:g}, k = {k:g}"
            lines.append(spread(name, [row["speedup"] for row in cells], (lambda v: f"{v:.2f}×") if draft else (lambda v: f"{v:.3f}")))
    return "\n".join([*lines, ""])


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
    if _experiment(profile) != "benchmark":
        n, weights = measured["params"]["n_prompts"], measured["params"].get("weights")
        lines += ["", f"The same models{f', their weights {weights}' if weights else ''}, **measured on two CPU cores** with {n} "
                  "held-out prompts (on the GPU itself C ÷ A is not measured yet):"]  # fmt: skip
    return "\n".join([*lines, ""])


def _recipe(profile: str) -> str:
    """What the distilled drafts and the control learned from; empty if nothing was distilled."""
    params = (_finished(profile, "distillation") or {"params": {}})["params"]
    if "iterations" not in params:
        return ""
    kind, own = params.get("divergence") or params.get("kind"), params.get("texts") == "data+target"
    amount = f"{params['iterations']:,} steps" + (f", {params['tokens'] / 1e6:.1f}M tokens," if "tokens" in params else "")
    of_it = f" ({params['own_text'] / 1e6:.1f}M tokens of it)" if "own_text" in params else ""
    again = "" if "batches" in params else (
        " Both began with the batches that the draft had been trained on, in the same order, from which a control learns less than from "
        "others (results/cpu/distillation_same_batches.json and, on others, distillation.json)."
    )
    last = f"{kind} on half data and half what the target itself writes at both temperatures{of_it}" if own else f"{kind} on the data"
    return (
        f"A distilled draft took {amount} more: first forward-kl on the data, in its last phase {last}; the control as many with "
        f"cross-entropy on the data.{again}\n"
    )


def _speeds_of_control(profile: str) -> list[str]:
    """Two lines of the profile's table, where the control ran beside the others."""
    found = _finished(profile, "benchmark_distilled") or _finished(profile, _experiment(profile)) or {"values": {}}
    best, as_block = (found["values"].get(key, {}) for key in ("best", "as_block"))
    if "small control T=1" not in best:
        return []
    zero, one, block = ({"value": line["speedup"], "ci95": [line["ci95_low"], line["ci95_high"]], "k": line["k"]} for line in (
        best["small control T=0"], best["small control T=1"], as_block["small control T=1"]))  # fmt: skip
    return [f"| speed-up C ÷ A, small control | {_bold(zero)} | {_bold(one)} |",
            f"| the same, drafts judged as a block | as above: both rules agree | {_bold(block)} |"]  # fmt: skip


def _offered(params: dict) -> str:
    """How many ids the drafts of a benchmark offer; empty if all."""
    return f"drafts offer the {params['draft_ids']:,} ids that the training text uses most" if params.get("draft_ids") else ""


def _commit(origin: dict) -> str:
    """The commit of a result, and whether the code was exactly that."""
    return f"{origin['commit']}{ {False: '', True: ' with changes', None: ', perhaps with changes'}[origin['dirty']]}"


def _machine(origin: dict) -> str:
    """The machine of a result, in what numbers it computes at its best, and the commit."""
    return f"{origin['machine']} with{'' if origin['bf16'] else 'out'} bfloat16, commit {_commit(origin)}"


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
        return _interval(fresh_acceptance(rows, name, t, best[f"{name} T={t}"]["k"]))

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
    ways = {"eager": "eager", "graphs": "CUDA graphs", "two_cores": "two CPU cores", "first_machine": "compiled",
            "distilled_first_machine": "compiled", "second_machine": "compiled"}  # fmt: skip
    for name, how in ((f"benchmark_{name}", how) for name, how in ways.items()):
        result = _finished(profile, name)
        if result is None or name == _experiment(profile):
            continue
        best, by_block = result["values"]["best"], result["values"].get("as_block", {})
        cells = [
            table.get(f"{draft} T={t}") for draft in ("small", "small distilled") for table, t in ((best, 0), (best, 1), (by_block, 1))
        ]
        n_sweep = len({row["prompt"] for row in load_rows(profile, name) if row.get("part") == "sweep"})
        params, origin = result["params"], result["provenance"]
        n_chosen_on = n_sweep + params.get("n_untimed_prompts", 0)
        how += f", distilled as in `{params['drafts']}.json`" if "drafts" in params else ""
        how += f"; {params['remark']}" if "remark" in params else ""
        how += f"; {_offered(params)}" if _offered(params) else ""
        fresh = result["values"].get("prediction", {}).get("fresh")
        lines.append(f"| {how} | {origin['machine']}, {_commit(origin)} | {params['n_prompts']} × {params['new_tokens']}, {n_chosen_on} "
                     f"| {best['target T=1']['tokens_per_second']:.0f} | {' | '.join(map(_speed, cells))} "
                     f"| {_errors(fresh) if fresh else '—'} |")  # fmt: skip
    if not lines:
        return ""
    head = ["In other ways or on other machines, C ÷ A of the small draft at temperatures 0 and 1:", "",
            "| passes | machine, commit | texts × tokens, texts to choose k | A, tokens/s | as trained, 0 | 1 | 1, as a block | distilled, 0 | 1 "
            "| 1, as a block | prediction for the fresh texts |", "|---" * 11 + "|"]  # fmt: skip
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


def _errors(found: dict | None) -> str:
    """An `agreement` in words."""
    if not found:
        return "not measured yet"
    r2 = "—" if found["r2"] is None else f"{found['r2']:.2f}"
    return f"R² = {r2}, {found['mean_error']:+.0%} on average, {found['within']} of {found['n']} within the interval"


def _headline_tables(h: dict, profile: str) -> str:
    def number(value, digits=2):
        return "not measured yet" if value is None else f"{value:.{digits}f}"

    def pair(key, show):
        return f"{show(h[key]['T0'])} | {show(h[key]['T1'])}"

    seconds = h["tokens_per_second"]
    verified = ", ".join(f"{m} rows v({m}) = {h[f'v{m}']:.2f}" for m in (5, 9) if h[f"v{m}"] is not None)  # k = 4 and 8, if swept
    params = (_finished(profile, _experiment(profile)) or {"params": {}})["params"]
    lines = [
        "| | temperature 0 | temperature 1 |",
        "|---|---|---|",
        f"| speed-up C ÷ A, small draft as trained | {_bold(h['speedup']['T0'])} | {_bold(h['speedup']['T1'])} |",
        f"| the same, drafts judged as a block | as above: both rules agree | {_bold(h['speedup_block']['T1'])} |",
        f"| speed-up C ÷ A, small draft distilled | {_bold(h['speedup_distilled']['T0'])} "
        f"| {_bold(h['speedup_distilled']['T1'])} |",
        f"| the same, drafts judged as a block | as above: both rules agree | {_bold(h['speedup_distilled_block']['T1'])} |",
        *_speeds_of_control(profile),
        f"| α, as trained | {pair('alpha', _interval)} |",
        f"| α, distilled | {pair('alpha_distilled', _interval)} |",
        f"| α, control: equal extra steps of cross-entropy | {pair('alpha_control', _interval)} |",
        f"| tokens per round, as trained | {pair('tokens_per_round', number)} |",
        f"| tokens per round, distilled | {pair('tokens_per_round_distilled', number)} |",
        f"| the target against itself, A ÷ A | {pair('aa', lambda cell: _interval(cell, 3))} |",
        "",
        f"Tokens per second at temperature 1, draft as trained: A (target alone) {number(seconds['A'], 0)}, B (draft alone) "
        f"{number(seconds['B'], 0)}, C (both) {number(seconds['C'], 0)}. In units of one target step, timed beside the sweep over k: "
        f"draft step c = {number(h['c'], 3)}, verifying {verified or 'not measured yet'}, the "
        f"decision o = {number(h['o'], 3)}. (c is of the longest drafts, divided by their k; it need not be A ÷ B, since B draws "
        f"one token a call{', of all ids' if _offered(params) else ''}, and C all drafts of a round, after a verifying pass.)",
        "",
        f"Speed-up predicted from costs and acceptance against measured: in the sweep, which both come from, "
        f"{_errors(h['prediction']['sweep'])}; on the fresh prompts, from the acceptance in other texts, "
        f"{_errors(h['prediction']['fresh'])}.",
        "",
    ]
    if h["provenance"]:
        p = h["provenance"]
        weights = f", weights in {_data_type(profile)}" if _data_type(profile) else ""
        lines += [f"Measured on {p['machine']}, {p['threads']} threads, torch {p['versions']['torch']}{weights}, commit {_commit(p)}."
                  + (f" The {_offered(params)}." if _offered(params) else ""), ""]
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
    longest = max(int(c["arm"].partition(" k=")[2] or 0) for c in peers["values"]["cells"] if c["arm"].startswith("transformers"))
    lines = [
        f"The same weights in transformers {version}, in turns with ours on {peers['params']['n_prompts']} texts, each side at the best "
        f"of the settings that were tried, up to k = {longest} for them ({peers['params']['draft']} draft, "
        f"{_machine(peers['provenance'])}; `make peers`):", "",
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


def _recipes_table(profile: str, name: str = "recipes") -> str:
    """What a draft reaches by every recipe, or by what it was trained on."""
    rows = load_rows(profile, name)
    if not rows:
        return ""
    columns = [column for column in rows[0] if "T =" in column]
    about, command = {
        "recipes": ("What a draft may learn from, in equal steps, and the α that it reaches", "make distill"),
        "batches": ("What it is worth to a draft that it was trained on the batches of its target, in the same order", "make batches"),
    }[name]
    lines = [f"{about} ({_machine(load(profile, name)['provenance'])}; `{command}`):", "",
             "| recipe | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    lines += [f"| {row['recipe']} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _cells(profile: str, name: str | None = None) -> list[dict]:
    """Every drafter, temperature and k that was measured: in the sweep of that experiment, or in those of the headline; once
    more at the k picked; and judged as a block. What two of them measured counts once, as the headline has it."""
    cells = {}
    for experiment in [name] if name else [_experiment(profile), "benchmark_distilled"]:
        sweep = [c for c in load_rows(profile, f"{experiment}_cells") if isinstance(c.get("k"), float)]
        cells |= {(c["draft"], c["temperature"], c["k"]): c for c in sweep}
        values = load(profile, experiment)["values"] if sweep else {}
        for part, remark in (("best", "once more on fresh prompts"), ("as_block", "judged as a block")):
            for key, line in values.get(part, {}).items():
                if "k" in line:
                    draft, temperature = key.split(" T=")
                    draft, temperature = f"{draft}, {remark}", float(temperature)
                    cells[draft, temperature] = line | {"draft": draft, "temperature": temperature}
    return list(cells.values())


def _losing_cells(profile: str, name: str | None = None, where: str = "") -> str:
    measured = _cells(profile, name)
    losing = [c for c in measured if c["speedup"] < 1]
    if not measured:
        return ""
    title = f"Cells in which speculation loses{where}: {len(losing)} of {len(measured)}"
    table = ["| draft | temperature | k | speed-up |", "|---" * 4 + "|"]
    table += [f"| {c['draft']} | {c['temperature']:g} | {c['k']:g} | {c['speedup']:.2f}× |" for c in losing]
    return "\n".join(_folded(title, table) if losing else [f"{title}.", ""])


if __name__ == "__main__":
    write()
