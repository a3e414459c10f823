"""Measurement of the three scenarios: A the target alone, B the draft alone, C both.

All arms run in one process, prompt by prompt in rotated order, so that a slow minute hits each of them. Ratios are of
totals, never means of ratios; intervals come from a paired bootstrap over prompts. Costs are measured in the units of
`theory.py`, so that the prediction stands beside the measurement. Nothing here plots or prints.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from . import theory
from .data import TokenData, held_out_prompts
from .drafting import Drafter, DraftModel
from .engine import Trace, generate, prefill, speculate
from .inference import ready
from .model import Transformer
from .profiles import BenchConfig
from .sampling import Randomness, Rule, Sampling, token_wise

Arm = Callable[[list[int], Randomness, Trace], object]  # runs one text to its end and fills the trace


def target_alone(model: Transformer, config: BenchConfig, sampling: Sampling) -> Arm:
    """Arm A, and with a draft as the model arm B."""

    def run(prompt, randomness, trace):
        for _ in generate(
            model, prompt, max_new_tokens=config.new_tokens, sampling=sampling, randomness=randomness, trace=trace
        ):
            pass

    return run


def both(
    target: Transformer, drafter: Drafter, k: int, config: BenchConfig, sampling: Sampling, rule: Rule = token_wise
) -> Arm:
    """Arm C: ``drafter`` proposes k tokens a round, the target verifies."""

    def run(prompt, randomness, trace):
        for _ in speculate(
            target, prompt, drafter=drafter, k=k, rule=rule, max_new_tokens=config.new_tokens, sampling=sampling,
            randomness=randomness, trace=trace,
        ):  # fmt: skip
            pass

    return run


def measure(arms: dict[str, Arm], prompts: list[list[int]], *, seed: int, warmup: int = 1, device="cpu") -> list[dict]:
    """One row per arm and prompt: seconds of wall time (prefill included) and what the trace says.

    The arms take turns on each prompt, starting with another one each time; the first ``warmup`` prompts run once
    more before anything counts. Every arm sees the same seed on the same prompt. Stop tokens are off.
    """
    names, rows = list(arms), []
    order = [(-1, p) for p in prompts[:warmup]] + list(enumerate(prompts))
    for i, prompt in tqdm(order, desc="measure", disable=not sys.stderr.isatty(), leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            trace = Trace(clock=time.perf_counter)
            began = clock()
            arms[name](prompt, Randomness(seed + i, device), trace)
            seconds = clock() - began
            if i >= 0:
                rows.append({"arm": name, "prompt": i, "seconds": seconds} | summary([trace]))
    return rows


def clock() -> float:
    """Seconds, after the accelerator has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(traces: list[Trace]) -> dict:
    """Counts of what happened; every ratio of the report is made from these.

    ``examined`` are the drafted tokens that the rule looked at: the accepted ones and the one refused after them.
    """
    rounds = [r for t in traces for r in t.rounds]
    out = {
        "tokens": sum(len(t.tokens) for t in traces),
        "target_passes": sum(t.target_passes for t in traces),
        "rounds": len(rounds),
        "drafted": sum(len(r.drafted) for r in rounds),
        "examined": sum(min(r.accepted + 1, len(r.drafted)) for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
        "distinct_tokens": sum(len(set(t.tokens)) for t in traces),
    }
    for step in ("prefill", "decode", "draft", "verify", "decide", "roll back"):
        out[f"{step.replace(' ', '_')}_seconds"] = sum(t.seconds.get(step, 0.0) for t in traces)
    return out


def acceptance_by_position(traces: list[Trace], k: int) -> list[float]:
    """αᵢ, i = 1 … k: how often the i-th draft of a round is accepted, given that all before it were (full rounds)."""
    accepted = np.array([r.accepted for t in traces for r in t.rounds if len(r.drafted) == k])
    return [float((accepted >= i).sum() / max(1, (accepted >= i - 1).sum())) for i in range(1, k + 1)]


def alpha(traces: list[Trace]) -> float:
    """Mean overlap Σ min(p, q) over the examined positions of traces that kept their probabilities."""
    overlaps = []
    for r in (r for t in traces for r in t.rounds):
        n = min(r.accepted + 1, len(r.drafted))
        overlaps += theory.overlap(r.target_probs[:n], r.draft_probs[:n]).tolist()
    return float(np.mean(overlaps))


def speed_ratio(rows: list[dict], arm: str, baseline: str, *, samples: int = 2000, seed: int = 0) -> dict:
    """Tokens per second of ``arm`` ÷ of ``baseline``: {"value", "ci95"}, a paired bootstrap over prompts."""
    table = {(r["arm"], r["prompt"]): r for r in rows}
    prompts = sorted({r["prompt"] for r in rows})
    column = {
        (name, key): np.array([table[name, p][key] for p in prompts], dtype=float)
        for name in (arm, baseline)
        for key in ("tokens", "seconds")
    }

    def ratio(i):
        fast, slow = (column[n, "tokens"][i].sum(-1) / column[n, "seconds"][i].sum(-1) for n in (arm, baseline))
        return fast / slow

    draws = np.random.default_rng(seed).integers(len(prompts), size=(samples, len(prompts)))
    low, high = np.percentile(ratio(draws), [2.5, 97.5])
    return {"value": float(ratio(np.arange(len(prompts)))), "ci95": [float(low), float(high)]}


def cell(rows: list[dict], arm: str, baseline: str) -> dict:
    """One line of the benchmark's table."""
    mine = [r for r in rows if r["arm"] == arm]
    total = {key: sum(r[key] for r in mine) for key in mine[0] if key not in ("arm", "prompt")}
    ratio = speed_ratio(rows, arm, baseline)
    out = {
        "arm": arm,
        "tokens_per_second": total["tokens"] / total["seconds"],
        "speedup": ratio["value"],
        "ci95_low": ratio["ci95"][0],
        "ci95_high": ratio["ci95"][1],
        "tokens_per_target_pass": total["tokens"] / max(1, total["target_passes"]),
        "distinct_fraction": total["distinct_tokens"] / total["tokens"],
    }
    if total["rounds"]:
        out |= {
            "tokens_per_round": total["tokens"] / total["rounds"],
            "accepted_per_examined": total["accepted"] / max(1, total["examined"]),
            "accepted_per_drafted": total["accepted"] / max(1, total["drafted"]),
        }
    return out


@dataclass(frozen=True)
class Costs:
    """What a round is made of, in units of one target-alone step (its sampling included)."""

    step_seconds: float  # one target step: one row through the model, probabilities, one draw
    c: float  # one draft step ÷ one target step
    v: dict[int, float]  # a verifying pass over m rows, probabilities included ÷ one target step
    o: float  # deciding and rolling back, per round ÷ one target step

    def verify(self, m: int) -> float:
        """v(m), interpolated between the measured m."""
        return float(np.interp(m, list(self.v), list(self.v.values())))


@torch.inference_mode()
def measure_costs(
    target: Transformer, draft: Transformer, prompt: list[int], sampling: Sampling, k_max: int, repeats: int = 24
) -> Costs:
    """Medians of interleaved timings with ``prompt`` in both caches."""
    randomness, n_ids, rows = Randomness(0, target.device), target.config.n_ids, range(1, k_max + 2)
    caches = {m: m.new_cache() for m in (target, draft)}
    for model, cache in caches.items():
        prefill(model, prompt + [prompt[-1]], cache)
    block = torch.tensor([[prompt[i % len(prompt)] for i in range(k_max + 1)]], device=target.device)

    def step(model):
        return randomness.choose(sampling.probs(model(block[:, :1], caches[model])[0, -1, :n_ids]))

    def verify(m):
        return sampling.probs(target(block[:, :m], caches[target])[0, :, :n_ids])

    p = verify(k_max + 1)
    caches[target].truncate(len(prompt))
    q = p[:-1].roll(1, 0)

    def decide():
        drafted = torch.cat([randomness.choose(row) for row in q[:1]] * k_max)
        began = time.perf_counter()
        _, following = token_wise(drafted, q, p, randomness)
        drafted.tolist() + following.tolist()
        for cache in caches.values():
            cache.truncate(len(prompt))
        return time.perf_counter() - began

    timings: dict = {}
    work = {"target": partial(step, target), "draft": partial(step, draft), "decide": decide}
    work |= {m: partial(verify, m) for m in rows}
    for i in range(repeats + 3):
        for name, function in work.items():
            began = clock()
            result = function()
            seconds = result if name == "decide" else clock() - began
            for cache in caches.values():
                cache.truncate(len(prompt))
            if i >= 3:
                timings.setdefault(name, []).append(seconds)
    median = {name: float(np.median(values)) for name, values in timings.items()}
    one = median["target"]
    return Costs(one, median["draft"] / one, {m: median[m] / one for m in rows}, median["decide"] / one)


@dataclass
class Benchmark:
    """What `run` measured. ``cells`` and ``rows`` are tables, one dict a line."""

    cells: list[dict]
    rows: list[dict]
    costs: dict[str, Costs]  # by draft and temperature, "small T=0"
    by_position: dict[str, list[float]]  # αᵢ, same keys
    alpha: dict[str, float]  # mean Σ min(p, q) at the examined positions, same keys
    best: dict[str, dict]  # the best k of each draft and temperature, measured again on all prompts, same keys
    aa: dict[str, dict]  # the target alone ÷ itself, by temperature
    r2: float  # of predicted against measured speed-up over all speculative cells of the sweep


def run(target: Transformer, drafts: dict[str, Transformer], data: TokenData, config: BenchConfig) -> Benchmark:
    """A, B and C with every draft, temperature and k on held-out prompts; then the best k of each on fresh ones."""
    target = ready(target, config.dtype)
    drafts = {name: ready(model, config.dtype) for name, model in drafts.items()}
    prompts = held_out_prompts(data, config.n_sweep_prompts + config.n_prompts, config.prompt_tokens)
    # every so-many-th prompt goes to the sweep, so that both sets cover all of the held-out text
    sweep = prompts[:: len(prompts) // config.n_sweep_prompts][: config.n_sweep_prompts]
    final = [p for p in prompts if p not in sweep][: config.n_prompts]
    k_max = max(config.ks)
    out = Benchmark([], [], {}, {}, {}, {}, {}, float("nan"))
    for temperature in config.temperatures:
        sampling, tag = Sampling(temperature), f"T={temperature:g}"
        alone = target_alone(target, config, sampling)
        arms = {"A": alone}
        arms |= {f"B {name}": target_alone(model, config, sampling) for name, model in drafts.items()}
        for name, model in drafts.items():
            arms |= {f"C {name} k={k}": both(target, DraftModel(model), k, config, sampling) for k in config.ks}
        rows = measure(arms, sweep, seed=config.seed, device=target.device)
        finals = {"A": alone, "A again": alone}
        for name, model in drafts.items():
            key = f"{name} {tag}"
            table = {k: cell(rows, f"C {name} k={k}", "A") for k in config.ks}
            traces = []
            for i, prompt in enumerate(sweep):
                traces.append(Trace(keep_probs=True))
                both(target, DraftModel(model), k_max, config, sampling)(prompt, Randomness(config.seed + i, target.device), traces[-1])
            out.by_position[key] = acceptance_by_position(traces, k_max)
            out.alpha[key] = alpha(traces)
            costs = measure_costs(target, model, sweep[0] * 2, sampling, k_max)
            out.costs[key] = costs
            for k, line in table.items():
                predicted = theory.speedup(out.by_position[key], k, costs.c, costs.verify, costs.o)
                line |= {"draft": name, "temperature": temperature, "k": k, "predicted": predicted}
            best = max(table, key=lambda k: table[k]["speedup"])
            out.best[key] = {"k": best}
            finals |= {
                f"B {name}": target_alone(model, config, sampling),
                f"C {name} k={best}": both(target, DraftModel(model), best, config, sampling),
            }
            out.cells += list(table.values())
            out.cells.append(cell(rows, f"B {name}", "A") | {"draft": name, "temperature": temperature})
        out.cells.append(cell(rows, "A", "A") | {"temperature": temperature})
        again = measure(finals, final, seed=config.seed + 1000, device=target.device)
        for name in drafts:
            key = f"{name} {tag}"
            k = out.best[key]["k"]
            out.best[key] |= cell(again, f"C {name} k={k}", "A") | {"draft_alone": cell(again, f"B {name}", "A")}
        out.best[f"target {tag}"] = cell(again, "A", "A")
        out.aa[tag] = speed_ratio(again, "A again", "A")
        for part, measured in (("sweep", rows), ("final", again)):
            out.rows += [{"temperature": temperature, "part": part} | r for r in measured]
    speculative = [line for line in out.cells if "predicted" in line]
    out.r2 = r_squared([c["speedup"] for c in speculative], [c["predicted"] for c in speculative])
    return out


def r_squared(measured: list[float], predicted: list[float]) -> float:
    """1 − Σ(measured − predicted)² / Σ(measured − mean)², of the prediction itself, not of a line fitted to it."""
    y, f = np.array(measured), np.array(predicted)
    return float(1 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum())

