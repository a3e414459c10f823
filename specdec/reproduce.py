"""The whole experiment as one unattended command: data, training, distillation, benchmark, results as it goes.

For machines that are lent by the minute. Whatever is finished is found and skipped, a training that was cut off is taken
up again, and no notebook kernel is needed; the notebooks find the same models afterwards.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from . import bench, native, report, roofline
from .data import TokenData, build_dir, tokens_for, write_json
from .distill import acceptance, distillation_loss, load_or_distill, written
from .drafting import PromptLookup
from .inference import PASSES, ready
from .model import ModelConfig, Transformer
from .prediction import agreement
from .profiles import PROFILES, BenchConfig, Profile, Schedule, count, get_profile
from .train import History, Loss, cross_entropy, load_or_train, source_key, train

ROLES = ("target", "small", "medium")
DISTILLED = {"small distilled": ("small", None), "small control": ("small", "cross-entropy"),
             "medium distilled": ("medium", None)}  # fmt: skip
RECIPES = (  # what a draft may learn from: a divergence, and whose text
    ("cross-entropy", "data"), ("forward-kl", "data"), ("total-variation", "data"), ("neg-log-alpha", "data"),
    ("forward-kl", "draft"), ("neg-log-alpha", "draft"), ("neg-log-alpha", "target"), ("forward-kl", "data+target"),
    ("neg-log-alpha", "data+target"),
)  # fmt: skip
_KERNELS = [Path(__file__).with_name(name).read_text() for name in ("native.cpp", "native.cu", "sampling.cu", "draft.cu")]
_PYTHON = source_key("sampling", "model", "passes", "native", "compiled", "cuda", "inference", "drafting", "engine")
DECODING = hashlib.sha256("".join((_PYTHON, *_KERNELS)).encode()).hexdigest()[:12]  # what decodes, and so decides a speed
OWN_SEED = 100  # added to a draft's seed it makes it draw batches that neither target nor distillation drew
TRAINING_SHARE = 0.75  # of the minutes that are left once the text is ready; the rest is compiling and measuring


def reproduce(
    name: str, *, minutes: float | None = None, tokens: str | None = None, source: str | None = None,
    drafts: tuple[str, ...] = ROLES[1:], device: str | torch.device | None = None, say: Callable[[str], None] = print,
) -> str:  # fmt: skip
    """Run everything and return the name of the profile that was run, for example "seed@312M".

    ``tokens`` ("300M") is what the target reads; ``minutes`` measures how fast this machine trains and chooses it; with
    neither, the profile's full schedules run. ``source`` "text:PATH" takes the text from local files. ``drafts`` are the
    roles that are trained, distilled and measured beside the target; "small" must be among them.
    """
    if minutes is not None and tokens is not None:
        raise ValueError("give a budget of --minutes or of --tokens, not both.")
    if source is not None and not (source.startswith("text:") and source.strip() != "text:"):
        raise ValueError(f"the source is {source!r}; write text:PATH, or leave it out for the profile's own.")
    if "@" in name and not (minutes is tokens is source is None):
        raise ValueError(f"the profile {name!r} names its budget and text already; give that, or --minutes, --tokens and --data.")
    if tokens is not None:
        count(tokens)
    if "small" not in drafts or not set(drafts) <= set(ROLES[1:]):
        raise ValueError(f"the drafts are {', '.join(drafts)}; give small, or small and medium.")
    roles, distilled = ("target", *drafts), {n: (role, kind) for n, (role, kind) in DISTILLED.items() if role in drafts}
    began = time.monotonic()
    base = name.partition("@")[0]
    path = source.removeprefix("text:") if source else ""
    device = available(device)
    if minutes is not None:
        tokens = budget(base, path, minutes, device, began, say, drafts)
    if tokens is not None or path:
        name = f"{base}@{tokens or label(PROFILES[base].schedules['target'].tokens)}" + (f":{path}" if path else "")
    profile = get_profile(name)
    public = name.partition(":")[0]  # without a path of this machine
    say(f"{public}: {', '.join(f'{role} {profile.schedules[role].tokens / 1e6:,.1f}M tokens' for role in roles)}")
    data = tokens_for(profile)
    models, histories = {}, {}
    for role in roles:
        models[role], histories[role] = load_or_train(profile, role, device=device)
        say(line_of(role, profile, histories[role]))
    record_training(profile, models, histories)
    for label_, (role, loss) in distilled.items():
        models[label_], histories[label_] = load_or_distill(profile, loss, role=role, device=device)
        say(f"{label_}: validation loss {histories[label_].validation_loss:.3f}, {histories[label_].seconds:.0f} s")
    record_distillation(profile, models, histories, data)
    origin = "local text" if path else data.info["config"]["source"]  # where local files lay is nobody's business
    run = {"run": public, "data": {"source": origin, "sha256": data.sha256, "tokens": len(data.train)},
           "fingerprints": {name: fingerprint(model) for name, model in models.items()}, "sources": DECODING}  # fmt: skip
    if is_done(profile, "roofline", run):
        say("roofline: done before")
    else:
        record_roofline(profile, models, run)
    for experiment, (settings, where, drafts) in stages(profile.bench, device).items():
        if is_done(profile, experiment, asdict(settings) | run):
            say(f"{experiment}: done before")
            continue
        with two_cores(where != device):
            chosen = {name: model for name, model in models.items() if name == "target" or name in (drafts or models)}
            # what a cut would leave
            keep = partial(record_benchmark, profile, settings=settings, experiment=experiment, finished=False)
            result = measure(chosen, data, settings, where, keep)
        record_benchmark(profile, result, settings, experiment=experiment, run=run)
        if experiment == "benchmark":
            update_headline(profile.name)
        for key, best in result.best.items():
            say(f"{experiment} {key}: {best['tokens_per_second']:.0f} tokens/s, {best['speedup']:.2f}× the target alone"
                + (f", {result.as_block[key]['speedup']:.2f}× by the block rule" if key in result.as_block else ""))  # fmt: skip
    say(f"done after {(time.monotonic() - began) / 60:.1f} minutes; PROFILE={public} names it")
    return name


def available(device: str | torch.device | None) -> str | torch.device:
    """That device if it is there, and if none is named the GPU where there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"the device {str(device)!r} is not here; choose cpu, or cuda where there is one.") from error
    return device


# ---- the budget


def budget(
    base: str, path: str, minutes: float, device: str | torch.device, began: float, say: Callable,
    drafts: tuple[str, ...] = ROLES[1:],
) -> str:  # fmt: skip
    """How many tokens the target can read so that all trainings together fit, as "312M". Remembered, because a run that
    is taken up again has to find the schedules that it began with."""
    if not 0 < minutes < float("inf"):
        raise ValueError(f"{minutes} minutes are no budget; give more than 0.")
    plan = build_dir() / base / "plan.json"
    request = {"minutes": minutes, "source": path, "drafts": list(drafts), "machine": report.machine(), "device": str(device)}
    with suppress(OSError, ValueError):  # none, or a damaged one
        known = json.loads(plan.read_text())
        if known["request"] == request:
            return known["tokens"]
    profile = get_profile(base if not path else f"{base}@{label(PROFILES[base].schedules['target'].tokens)}:{path}")
    data = tokens_for(profile)
    seconds = sum(training_seconds(profile, data, device, say, drafts).values())
    left = TRAINING_SHARE * (60 * minutes - (time.monotonic() - began))
    if left <= 0:
        raise ValueError(f"{minutes} minutes are over before training can begin; the text is ready now, so run it again.")
    tokens = label(profile.schedules["target"].tokens * min(1.0, left / seconds))
    write_json(plan, {"request": request, "tokens": tokens})
    return tokens


def training_seconds(
    profile: Profile, data: TokenData, device, say: Callable, drafts: tuple[str, ...] = ROLES[1:]
) -> dict[str, float]:
    """What the full schedules would take here, extrapolated from a few steps of each."""
    target = Transformer(profile.models["target"], torch.Generator().manual_seed(0)).to(device)
    out = {}
    for role in ("target", *drafts):
        out[role] = _seconds(profile.models[role], profile.schedules[role], data, device, cross_entropy)
    for name, (role, kind) in DISTILLED.items():
        if role not in drafts:
            continue
        loss = cross_entropy if kind == "cross-entropy" else distillation_loss(target, kind or profile.divergence)
        out[name] = _seconds(profile.models[role], profile.distillation, data, device, loss)
    say("the full schedules would take " + ", ".join(f"{name} {s / 60:,.0f} min" for name, s in out.items()))
    return out


def _seconds(config: ModelConfig, schedule: Schedule, data: TokenData, device, loss: Loss, steps: int = 6) -> float:
    phase = replace(schedule.phases[-1], accumulation=1, iterations=2 * steps, warmup=0, evaluate_every=steps)
    trial = replace(schedule, phases=(phase,), evaluation_batches=1)
    model = Transformer(config, torch.Generator().manual_seed(0)).to(device)
    first, last = train(model, data, trial, loss=loss).rows  # the first half has the compiling in it
    return (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"]) * schedule.tokens


def label(tokens: float) -> str:
    """A number of tokens in short, rounded down: 312M, 24k."""
    if tokens >= 1e6:
        return f"{int(tokens / 1e6)}M"
    return f"{max(1, int(tokens / 1e3))}k"


# ---- training, told and recorded


def training_flops(config: ModelConfig, block_size: int) -> float:
    """Floating-point operations to train on one token: 6 per weight, and causal attention; embedding rows are free."""
    with torch.device("meta"):
        weights = Transformer(config).n_params(read_per_token=True)
    return 6 * weights + 6 * config.n_layers * config.width * block_size


def line_of(role: str, profile: Profile, history: History) -> str:
    rate = history.rows[-1]["tokens"] / history.seconds
    flops = rate * training_flops(profile.models[role], profile.schedules[role].block_size)
    return (f"{role}: validation loss {history.validation_loss:.3f}, {history.seconds:.0f} s, {rate:,.0f} tokens/s, "
            f"{flops / 1e12:.2f} TFLOP/s")  # fmt: skip


def record_training(profile: Profile, models: dict[str, Transformer], histories: dict[str, History]) -> None:
    """``training.json`` and every evaluation as CSV."""
    values = {}
    for role, history in histories.items():
        rate = history.rows[-1]["tokens"] / history.seconds
        values[role] = {
            "weights": models[role].n_params(),
            "read_per_token": models[role].n_params(read_per_token=True),
            "validation_loss": history.validation_loss,
            "seconds": history.seconds,
            "tokens_per_second": rate,
            "flops": rate * training_flops(profile.models[role], profile.schedules[role].block_size),
        }
    schedules = {role: profile.schedules[role] for role in histories}
    params = {role: {"iterations": s.iterations, "tokens": s.tokens} for role, s in schedules.items()}
    rows = [{"model": role} | row for role, history in histories.items() for row in history.rows]
    report.record(profile.name, "training", params=params, values=values, rows=rows, seed=profile.schedules["target"].seed)


OTHER_BATCHES = "not those of the draft's training"  # results without this word are from before each training had a seed


def record_distillation(profile: Profile, models: dict, histories: dict, data: TokenData, n_windows: int = 24) -> None:
    """``distillation.json``: α on held-out text of every draft, and what its training cost."""
    values = {name: {} for name in models if name != "target"}
    for name, line in values.items():
        line["alpha_held_out"] = {
            f"T{t:g}": acceptance(models["target"], models[name], data, temperature=t, n_windows=n_windows).mean().item()
            for t in profile.bench.temperatures
        }
        line |= {"validation_loss": histories[name].validation_loss, "seconds": histories[name].seconds}
    schedule = profile.distillation
    params = {"iterations": schedule.iterations, "tokens": schedule.tokens, "texts": profile.texts,
              "divergence": profile.divergence, "batches": OTHER_BATCHES}  # fmt: skip
    if profile.texts != "data":
        params["own_text"] = min(profile.own_text, schedule.tokens)
    rows = [{"model": name} | row for name in values for row in histories[name].rows]
    alphas = {"as trained": "small", "control": "small control", "distilled": "small distilled"}
    values = {"alpha_held_out": {label: values[name]["alpha_held_out"] for label, name in alphas.items()}, "drafts": values}
    report.record(profile.name, "distillation", params=params, values=values, rows=rows)


def compare_recipes(profile: Profile, *, role: str = "small", device="cpu", n_windows: int = 48, say=print) -> list[dict]:
    """``recipes.json``: α of a draft distilled by every recipe."""

    def drafts() -> Iterator[tuple[str, Transformer, History]]:
        yield "as trained", *load_or_train(profile, role, device=device)
        for kind, text in RECIPES:
            whose = None if kind == "cross-entropy" else text  # the control reads the data in any case
            label = "control" if kind == "cross-entropy" else f"{kind} on {text}"
            yield label, *load_or_distill(profile, kind, role=role, texts=whose, device=device)

    return _compared("recipes", drafts(), profile, role, device, n_windows, say)


def compare_batches(profile: Profile, *, role: str = "small", device="cpu", n_windows: int = 48, say=print) -> list[dict]:
    """``batches.json``: what it is worth to a draft that it was trained on its target's batches, in their order, as drafts of one
    seed are; beside it stands one that drew its own."""

    def drafts() -> Iterator[tuple[str, Transformer, History]]:
        schedule = profile.schedules[role]
        apart = replace(profile, schedules=profile.schedules | {role: replace(schedule, seed=schedule.seed + OWN_SEED)})
        for batches, of in (("the target's batches", profile), ("batches of its own", apart)):
            yield f"as trained, on {batches}", *load_or_train(of, role, device=device)
            yield f"control, begun on {batches}", *load_or_distill(of, "cross-entropy", role=role, device=device)
            yield f"distilled, begun on {batches}", *load_or_distill(of, role=role, device=device)

    return _compared("batches", drafts(), profile, role, device, n_windows, say)


def _compared(
    name: str, drafts: Iterable[tuple[str, Transformer, History]], profile: Profile, role: str, device, n_windows: int,
    say: Callable[[str], None],
) -> list[dict]:  # fmt: skip
    """Record under that name the α of every draft, on held-out text and on what the target wrote at the same temperature.

    The second is what a speculative engine reads: everything it emits follows the target's law.
    """
    data, block = tokens_for(profile), profile.distillation.block_size
    target = load_or_train(profile, "target", device=device)[0]
    texts = {}
    for t in profile.bench.temperatures:
        own = written(target, data.validation, n_windows, block + 1, eot=data.eot, seed=profile.bench.seed, temperature=t)
        texts |= {("held-out text", t): data, ("the target's text", t): replace(data, validation=own)}
    lines = []
    for recipe, draft, history in drafts:
        alphas = {
            f"{text}, T = {t:g}": acceptance(target, draft, tokens, temperature=t, n_windows=n_windows).mean().item()
            for (text, t), tokens in sorted(texts.items())
        }
        say(f"{recipe:42s} " + "  ".join(f"{text}: {a:.3f}" for text, a in alphas.items()))
        lines.append({"recipe": recipe, "role": role, "seconds": history.seconds, "validation_loss": history.validation_loss} | alphas)
    params = {"iterations": profile.distillation.iterations, "tokens": profile.distillation.tokens, "n_windows": n_windows,
              "batches": OTHER_BATCHES}  # fmt: skip
    report.record(profile.name, name, params=params, values={"recipes": lines}, rows=lines)
    return lines


# ---- the benchmark


def stages(config: BenchConfig, device: str | torch.device) -> dict[str, tuple[BenchConfig, str | torch.device, tuple]]:
    """What is measured: settings, where, and with which drafts (none named: all). On a GPU, beside the profile's own
    passes, the others for comparison, and the same models on two cores, all of which are slower and so get fewer texts."""
    out = {"benchmark": (config, device, ())}
    if torch.device(device).type == "cuda":
        pair, few = ("small", "small distilled"), {"n_sweep_prompts": 1, "n_untimed_prompts": 3, "n_prompts": 8}
        for passes in reversed(PASSES):  # the slowest last
            if passes != config.passes:
                out[f"benchmark_{passes}"] = replace(config, passes=passes, new_tokens=64, **few), device, pair
        # there a draft costs what it reads, which is nearly all output layer
        fewer_ids = config.draft_ids and config.draft_ids // 4
        two_cores = replace(
            config, passes="compiled", n_sweep_prompts=2, n_untimed_prompts=4, n_prompts=8, draft_ids=fewer_ids
        )
        out["benchmark_two_cores"] = two_cores, "cpu", ("small", "small distilled", "small control")
    return out


def measure(
    models: dict[str, Transformer], data: TokenData, settings: BenchConfig, device: str | torch.device,
    after: Callable[[bench.Benchmark], object] = lambda result: None,
) -> bench.Benchmark:  # fmt: skip
    """All drafts and prompt lookup on that device."""
    here = {name: model.to(device) for name, model in models.items()}
    target, drafters, alone = bench.equip(here, settings, data)
    drafters["lookup"] = PromptLookup(target.config.n_ids, device=target.device)
    return bench.run(target, drafters, alone, data, settings, after)


def measure_again(
    profile: Profile, *, device: str | torch.device | None = None, say: Callable[[str], None] = print
) -> list[dict]:  # fmt: skip
    """``runs.json``: what the headline quotes, measured once more by this process, beside what earlier ones found. Intervals
    over prompts do not know how a machine's state and a process's memory move a speed-up; the runs do.

    They are kept together as long as weights, settings, k, code and machine are the same.
    """
    device = available(device)
    notebooks_ran = (report.results_dir() / profile.name / "benchmark_distilled.json").exists()
    headline = report.load(profile.name, "benchmark_distilled" if notebooks_ran else "benchmark")["values"]
    models = {"target": load_or_train(profile, "target", device=device)[0], "small": load_or_train(profile, "small", device=device)[0],
              "small distilled": load_or_distill(profile, device=device)[0]}  # fmt: skip
    picked = {
        rule: {key: {"k": line["k"]} for key, line in headline[table].items() if key.partition(" T=")[0] in models and "k" in line}
        for rule, table in (("token-wise", "best"), ("block", "as_block"))
    }
    data = tokens_for(profile)
    target, drafters, _ = bench.equip(models, profile.bench, data)
    params = asdict(profile.bench) | {
        "decoded_in": str(target.dtype).removeprefix("torch."),
        "prompts": hashlib.sha256(repr(bench.split_prompts(data, profile.bench).fresh).encode()).hexdigest()[:12],
        "picked": picked, "fingerprints": {name: fingerprint(model) for name, model in models.items()},
        "sources": DECODING, "native": native.library_path().stem,
    }  # fmt: skip
    rows = report.load_rows(profile.name, "runs") if is_done(profile, "runs", params) else []
    number = 1 + max((int(row["run"]) for row in rows), default=0)
    new = [{"run": number} | line for line in bench.once_more(target, drafters, data, profile.bench, picked)]
    for line in new:
        what = f"{line['draft']} {line['rule']}, k = {line['k']}" if line["draft"] else "A ÷ A"
        say(f"run {number}, T = {line['temperature']:g}: {what}: {line['speedup']:.2f}× [{line['ci95_low']:.2f}, {line['ci95_high']:.2f}] "
            f"of {line['target_alone']:.0f} tokens/s")  # fmt: skip
    report.record(profile.name, "runs", params=params, values={"runs": number}, rows=rows + new, seed=profile.bench.seed)
    return new


@contextmanager
def two_cores(really: bool):
    """Confine this process to two cores, as far as the system lets it."""
    before, threads = getattr(os, "sched_getaffinity", lambda _: None)(0), torch.get_num_threads()
    try:
        if really:
            torch.set_num_threads(min(2, threads))
            if before:
                os.sched_setaffinity(0, sorted(before)[:2])
        yield
    finally:
        if really:
            torch.set_num_threads(threads)
            if before:
                os.sched_setaffinity(0, before)


def record_roofline(profile: Profile, models: dict[str, Transformer], run: dict) -> None:
    """``roofline.json``: a step of each model beside the floor that memory sets, in all the ways that passes can run."""
    steps = []
    for passes in PASSES:
        fast = {role: ready(models[role], profile.bench.dtype, passes) for role in ROLES if role in models}
        measured = roofline.measure_steps(fast)
        steps += [{"sizes": profile.name, "passes": passes} | row for row in roofline.as_rows(measured)]
    report.record(profile.name, "roofline", params=run, values={"steps": steps}, rows=steps)


def fingerprint(model: Transformer) -> str:
    """Of the weights, whatever machine they are on."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def is_done(profile: Profile, experiment: str, params: dict) -> bool:
    """Whether just this was measured on a machine like this one: a clone brings results of other runs along."""
    try:
        known = report.load(profile.name, experiment)
    except ValueError:
        return False
    return known["params"] == json.loads(json.dumps(params)) and known["provenance"]["machine"] == report.machine()


def record_benchmark(
    profile: Profile, result: bench.Benchmark, settings: BenchConfig, *, experiment: str = "benchmark", run: dict | None = None,
    finished: bool = True,
) -> None:  # fmt: skip
    """``<experiment>.json`` with its raw rows, ``<experiment>_cells`` with one line per drafter, temperature and k, and
    the figure of those. Without ``run`` the experiment does not count as done; one that is not ``finished`` says so."""
    report.record(
        profile.name, experiment, params=asdict(settings) | (run or {}) | ({} if finished else {"unfinished": True}),
        values={
            "best": result.best, "as_block": result.as_block, "best_k": result.best_k, "aa": result.aa, "alpha": result.alpha,
            "acceptance_by_position": result.by_position, "prediction": {"sweep": result.sweep_errors, "fresh": result.fresh_errors},
            "costs": {key: asdict(costs) for key, costs in result.costs.items()},
            "final_costs": {key: asdict(costs) for key, costs in result.final_costs.items()},
        },
        rows=result.rows, seed=settings.seed,
    )  # fmt: skip
    report.record(profile.name, f"{experiment}_cells", params={}, values={"cells": len(result.cells)}, rows=result.cells)
    if run and settings.n_sweep_prompts > 1:  # the curves of a single text say little
        report.style()
        figure = speedups([cell for cell in result.cells if "predicted" in cell])
        report.save_figure(figure, profile.name, experiment)
        plt.close(figure)


def speedups(cells: list[dict]) -> Figure:
    """Measured and predicted speed-up by k, a panel for each temperature."""
    temperatures, drafts = (sorted({cell[key] for cell in cells}) for key in ("temperature", "draft"))
    figure, axes = plt.subplots(1, len(temperatures), figsize=(8, 3.4), sharey=True, squeeze=False)
    for axis, temperature in zip(axes[0], temperatures):
        for draft in drafts:
            mine = [cell for cell in cells if (cell["temperature"], cell["draft"]) == (temperature, draft)]
            ks = [cell["k"] for cell in mine]
            y, low, high = (np.array([cell[key] for cell in mine]) for key in ("speedup", "ci95_low", "ci95_high"))
            axis.errorbar(ks, y, [(y - low).clip(0), (high - y).clip(0)], fmt="o-", color=report.color_of(draft), label=draft)
            axis.plot(ks, [cell["predicted"] for cell in mine], "--", color=report.color_of(draft), alpha=0.6)
        report.break_even(axis)
        axis.set(xlabel="k, drafted tokens per round", title=f"temperature {temperature:g}", ylim=(0, None))
    axes[0, 0].set(ylabel="speed-up, C ÷ A")
    axes[0, -1].legend(fontsize=8)  # temperature 1, where there is room above the curves
    return figure


def update_headline(profile: str, experiment: str = "benchmark") -> None:
    """What the README quotes, out of what ``experiment`` left in ``results/``: the small draft as trained and, where they were
    measured, distilled and its control."""
    trained, distilled, control = "small", "small distilled", "small control"
    measured = report.load(profile, experiment)
    values, rows = measured["values"], report.load_rows(profile, experiment)
    cells = [cell for cell in report.load_rows(profile, f"{experiment}_cells") if cell.get("predicted", "") != ""]
    temperatures = [key.partition("T=")[2] for key in values["aa"]]

    def speeds(name, table):
        lines = {f"T{t}": table[f"{name} T={t}"] for t in temperatures if f"{name} T={t}" in table}
        return {t: {"value": b["speedup"], "ci95": [b["ci95_low"], b["ci95_high"]], "k": b["k"]} for t, b in lines.items()}

    def alphas(name):
        out = {}
        for t in temperatures:
            k = values["best"][f"{name} T={t}"]["k"]
            out[f"T{t}"] = report.fresh_acceptance(rows, name, float(t), k) | {"k": k}
        return out

    def fresh(key, line):  # runs before this was timed have the prediction of the sweep
        name, _, t = key.partition(" T=")
        same = (c["predicted"] for c in cells if (c["draft"], c["temperature"], c["k"]) == (name, float(t), line["k"]))
        return {"predicted": next(same)} | line

    best, costs = {f"T{t}": values["best"][f"{trained} T={t}"] for t in temperatures}, values["costs"][f"{trained} T=1"]
    longest, v = max(map(int, costs["drafts"])), costs["v"]
    quoted = {
        "speedup": speeds(trained, values["best"]),
        "speedup_block": speeds(trained, values["as_block"]),
        "tokens_per_second": {
            "A": values["best"]["target T=1"]["tokens_per_second"],
            "B": best["T1"]["draft_alone"]["tokens_per_second"],
            "C": best["T1"]["tokens_per_second"],
        },
        "alpha": alphas(trained),
        "tokens_per_round": {t: line["tokens_per_round"] for t, line in best.items()},
        "c": costs["drafts"][str(longest)] / longest, "v5": v.get("5"), "v9": v.get("9"), "o": costs["o"],
        "prediction": {
            "sweep": agreement(cells),
            "fresh": agreement([fresh(key, line) for key, line in values["best"].items() if "k" in line]),
        },
        "aa": {f"T{t}": values["aa"][f"T={t}"] for t in temperatures},
    }  # fmt: skip
    if f"{distilled} T=1" in values["best"]:
        quoted |= {
            "speedup_distilled": speeds(distilled, values["best"]),
            "speedup_distilled_block": speeds(distilled, values["as_block"]),
            "alpha_distilled": alphas(distilled), "alpha_control": alphas(control),
            "tokens_per_round_distilled": {f"T{t}": values["best"][f"{distilled} T={t}"]["tokens_per_round"] for t in temperatures},
        }  # fmt: skip
    report.update_headline(profile, measured["provenance"], **quoted)
