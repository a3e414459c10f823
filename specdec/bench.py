"""Measurement of the three scenarios: A the target alone, B the draft alone, C both.

All arms run in one process, prompt by prompt in rotated order, so that a slow minute hits each of them. Ratios are of
totals, never means of ratios; intervals come from a paired bootstrap over the documents that prompts are from. What
`prediction.py` promises stands beside every measurement. Nothing here plots or prints.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from . import theory
from .data import TokenData, held_out_prompts
from .drafting import CapturedDraftModel, Drafter, drafter_of, frequent_ids
from .engine import Trace, generate, prefill, speculate
from .inference import ready, ready_rule, trimmed
from .model import Transformer
from .prediction import (
    Costs, Timings, acceptance_of_texts, agreement, best_as_block, clock, costs_of, predict, time_parts,
)  # fmt: skip
from .profiles import BenchConfig
from .sampling import Randomness, Rule, Sampling, block, token_wise

FEWEST = 20  # rounds that have to reach a position for its acceptance to be worth showing
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
    rule = ready_rule(rule, config.passes, target.device)

    def run(prompt, randomness, trace):
        for _ in speculate(
            target, prompt, drafter=drafter, k=k, rule=rule, max_new_tokens=config.new_tokens, sampling=sampling,
            randomness=randomness, trace=trace,
        ):  # fmt: skip
            pass

    return run


def measure(
    arms: dict[str, Arm], prompts: list[list[int]], *, seed: int, warmup: int = 1, device="cpu",
    traces: dict[str, list[Trace]] | None = None, between: Callable[[], object] = lambda: None,
) -> list[dict]:  # fmt: skip
    """One row per arm and prompt: seconds of wall time (prefill included) and what the trace says.

    The arms take turns on each prompt, starting with another one each time; the first ``warmup`` prompts run once
    more before anything counts. Every arm sees the same seed on the same prompt. Stop tokens are off. A text in which
    the system says that it gave a processor to another machine is run again, twice at most, whatever arm it is; but after one
    text in ten no more, for where processors are taken away all the time there is nothing better to wait for. ``runs`` of a row
    says how often it was run, ``document`` where its prompt is from. ``traces`` receives what each arm did, prompt by prompt;
    ``between`` is called after each prompt.
    """
    names, rows = list(arms), []
    order = [(-1, p) for p in prompts[:warmup]] + list(enumerate(prompts))
    spare = max(2, len(order) * len(names) // 10)
    for i, prompt in tqdm(order, desc="measure", disable=not sys.stderr.isatty(), leave=False):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            for runs in (1, 2, 3):
                trace, before = Trace(clock=time.perf_counter), stolen()
                began = clock()
                arms[name](prompt, Randomness(seed + i, device), trace)
                seconds = clock() - began
                if stolen() == before or runs == 3 or spare == 0:
                    break
                spare -= 1
            if i >= 0:
                where = {"prompt": i, "document": getattr(prompt, "document", i)}
                rows.append({"arm": name} | where | {"runs": runs, "seconds": seconds} | summary([trace]))
                if traces is not None:
                    traces.setdefault(name, []).append(trace)
        between()
    return rows


def stolen(counts: str = "/proc/stat") -> int:
    """Ticks for which this virtual machine wanted its processors and another one had them; 0 where nobody counts them."""
    try:
        with open(counts) as lines:
            return int(lines.readline().split()[8])  # proc_stat(5): cpu, user, nice, system, idle, iowait, irq, softirq, steal
    except (OSError, IndexError):
        return 0


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


def acceptance_by_position(traces: list[Trace], k: int, fewest: int = 1) -> list[float]:
    """αᵢ, i = 1 … k: how often the i-th draft of a round is accepted, given that all before it were; NaN where fewer than ``fewest``
    rounds came so far."""
    rounds = [r for t in traces for r in t.rounds]
    reached = [sum(len(r.drafted) >= i and r.accepted >= i - 1 for r in rounds) for i in range(1, k + 1)]
    passed = [sum(r.accepted >= i for r in rounds) for i in range(1, k + 1)]
    return [p / n if n >= fewest else float("nan") for p, n in zip(passed, reached)]


def alpha(traces: list[Trace]) -> float:
    """Mean overlap Σ min(p, q) over the examined positions of traces that kept their probabilities."""
    overlaps = []
    for r in (r for t in traces for r in t.rounds):
        n = min(r.accepted + 1, len(r.drafted))
        overlaps += theory.overlap(r.target_probs[:n], r.draft_probs[:n]).tolist()
    return float(np.mean(overlaps))


WHERE = ("prompt", "document")  # columns of a row that are not counts


def together(rows: list[dict], arm: str) -> list[dict]:
    """``rows`` with those of the arms "``arm`` beside …" added up to one of ``arm`` for each prompt."""
    sums, others = {}, []
    for row in rows:
        if not row["arm"].startswith(f"{arm} beside "):
            others.append(row)
            continue
        total = sums.setdefault(row["prompt"], dict.fromkeys(row, 0) | {"arm": arm} | {key: row[key] for key in row.keys() & WHERE})
        for key in row.keys() - {"arm", *WHERE}:
            total[key] += row[key]
    return [*sums.values(), *others]


def speed_ratio(rows: list[dict], arm: str, baseline: str, *, samples: int = 2000, seed: int = 0) -> dict:
    """Tokens per second of ``arm`` ÷ of ``baseline``: {"value", "ci95"}, a paired bootstrap over `groups` of prompts."""
    of = groups(rows)
    (tokens, seconds), (others, their_seconds) = (sums(rows, name, of, ("tokens", "seconds")) for name in (arm, baseline))

    def ratio(i):
        return (tokens[i].sum(-1) / seconds[i].sum(-1)) / (others[i].sum(-1) / their_seconds[i].sum(-1))

    return _bootstrap(ratio, len(tokens), samples, seed)


def acceptance(rows: list[dict], arm: str, *, samples: int = 2000, seed: int = 0) -> dict:
    """Accepted ÷ examined drafts of ``arm``: {"value", "ci95"}, a bootstrap over `groups` of prompts. Under the token-wise rule
    its expectation is α at the examined positions."""
    accepted, examined = sums(rows, arm, groups([r for r in rows if r["arm"] == arm]), ("accepted", "examined"))
    return _bootstrap(lambda i: accepted[i].sum(-1) / examined[i].sum(-1).clip(1), len(accepted), samples, seed)


def groups(rows: list[dict]) -> dict[int, int]:
    """The group of each prompt, from 0 on. Prompts from one document are alike, so what is drawn anew in a bootstrap are documents;
    where rows do not name five of them at least, the prompts."""
    document = {r["prompt"]: r.get("document", r["prompt"]) for r in rows}
    if len(set(document.values())) < 5:
        document = {prompt: prompt for prompt in document}
    number = {name: i for i, name in enumerate(sorted(set(document.values())))}
    return {prompt: number[name] for prompt, name in document.items()}


def sums(rows: list[dict], arm: str, of: dict[int, int], keys: Sequence[str]) -> np.ndarray:
    """``keys`` of ``arm`` added up for each of the groups ``of`` prompts: (len(keys), groups)."""
    out = np.zeros((len(keys), 1 + max(of.values())))
    for r in rows:
        if r["arm"] == arm:
            out[:, of[r["prompt"]]] += [r[key] for key in keys]
    return out


def _bootstrap(ratio: Callable, n: int, samples: int, seed: int) -> dict:
    """``ratio`` of indices (…, n) of groups, and where 95% of it lies when they are drawn anew."""
    low, high = np.percentile(ratio(np.random.default_rng(seed).integers(n, size=(samples, n))), [2.5, 97.5])
    return {"value": float(ratio(np.arange(n))), "ci95": [float(low), float(high)]}


def cell(rows: list[dict], arm: str, baseline: str) -> dict:
    """One line of the benchmark's table."""
    mine = [r for r in rows if r["arm"] == arm]
    total = {key: sum(r[key] for r in mine) for key in mine[0] if key not in ("arm", *WHERE)}
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


@dataclass
class Benchmark:
    """What `run` measured. ``cells`` and ``rows`` are tables, one dict a line; keys are like "small T=0"."""

    cells: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    costs: dict[str, Costs] = field(default_factory=dict)  # by drafter and temperature, beside the sweep
    final_costs: dict[str, Costs] = field(default_factory=dict)  # beside the fresh prompts, of the k that is run there
    by_position: dict[str, list[float]] = field(default_factory=dict)  # αᵢ over all k, NaN where `FEWEST` rounds did not come
    alpha: dict[str, float] = field(default_factory=dict)  # mean Σ min(p, q) at the examined positions of the sweep
    best: dict[str, dict] = field(default_factory=dict)  # each at the k that theory says is best, on fresh prompts
    as_block: dict[str, dict] = field(default_factory=dict)  # the same where the block rule decides, above temperature 0
    best_k: dict[str, dict] = field(default_factory=dict)  # what theory picks ÷ the best of the sweep
    aa: dict[str, dict] = field(default_factory=dict)  # the target alone ÷ itself, by temperature
    sweep_errors: dict = field(default_factory=dict)  # `agreement` of all speculative cells of the sweep
    fresh_errors: dict = field(default_factory=dict)  # and of what was run on fresh prompts


def equip(
    models: dict[str, Transformer], config: BenchConfig, data: TokenData
) -> tuple[Transformer, dict[str, Drafter], dict[str, Transformer]]:
    """The target, a drafter of every other model, and those models for drafting alone, all as fast as ``config`` says."""
    target = ready(models["target"], config.dtype, config.passes)
    drafts = {name: model for name, model in models.items() if name != "target"}
    alone = {name: ready(model, config.dtype, config.passes) for name, model in drafts.items()}
    ids = frequent_ids(data, config.draft_ids).to(target.device) if config.draft_ids else None
    captured, fast = config.passes == "graphs", dict(alone)
    if captured or ids is not None:
        passes = "eager" if captured else config.passes  # the whole chain of drafts is captured, not its steps
        cut = {name: model if ids is None else trimmed(model, ids) for name, model in drafts.items()}
        fast = {name: ready(model, config.dtype, passes) for name, model in cut.items()}
    drafter = CapturedDraftModel if captured else drafter_of
    return target, {name: drafter(model) for name, model in fast.items()}, alone


class Prompts(NamedTuple):
    """Held-out prompts, each list from all of the held-out text, and none in two of them."""

    sweep: list[list[int]]  # for every k
    untimed: list[list[int]]  # more texts to predict from
    fresh: list[list[int]]  # for the final figures


def arm_of(name: str, k: int, rule: Rule = token_wise) -> str:
    """The name of the arm C with that drafter."""
    return f"C {name} block k={k}" if rule is block else f"C {name} k={k}"


def split_prompts(data: TokenData, config: BenchConfig) -> Prompts:
    """As many prompts of each kind as ``config`` says."""
    sizes = config.n_sweep_prompts, config.n_untimed_prompts, config.n_prompts
    left, chosen = held_out_prompts(data, sum(sizes), config.prompt_tokens), []
    for size in sizes:
        taken = [left[i] for i in np.linspace(0, len(left) - 1, size).astype(int)]
        left = [prompt for prompt in left if prompt not in taken]
        chosen.append(taken)
    return Prompts(*chosen)


def run(
    target: Transformer, drafters: dict[str, Drafter], alone: dict[str, Transformer], data: TokenData, config: BenchConfig,
    after: Callable[[Benchmark], object] = lambda result: None,
) -> Benchmark:  # fmt: skip
    """A, B and C with every drafter, temperature and k on held-out prompts; then each on fresh ones, at the k that
    theory picks.

    The arguments are what `equip` returns, and whatever drafters one wants to add. What is predicted in the sweep comes from
    the acceptance by position of each of its texts and from costs measured in turns with them; k is picked by the same costs and
    these texts and those not timed, from which, with costs measured in turns with the fresh prompts, the speed on these is
    predicted too. ``after`` each temperature is told what there is so far.
    """
    out, prompts = Benchmark(), split_prompts(data, config)
    for temperature in config.temperatures:
        here = _Temperature(target, drafters, alone, config, prompts, Sampling(temperature), out)
        rows, traces, timings = here.sweep()
        predicted = {name: here.pick(name, rows, traces, costs_of(timings[name])) for name in drafters}
        out.cells += here.cells_alone(rows)
        again = here.confirm(predicted)
        for part, measured in (("sweep", rows), ("final", again)):
            out.rows += [{"temperature": temperature, "part": part} | r for r in measured]
        out.sweep_errors = agreement([line for line in out.cells if "predicted" in line])
        out.fresh_errors = agreement([line for line in out.best.values() if "predicted" in line])
        after(out)
    return out


@dataclass
class _Temperature:
    """The three steps of `run` at one temperature, in this order; each adds what it finds to ``out``."""

    target: Transformer
    drafters: dict[str, Drafter]
    alone: dict[str, Transformer]
    config: BenchConfig
    prompts: Prompts
    sampling: Sampling
    out: Benchmark

    def sweep(self) -> tuple[list[dict], dict[str, list[Trace]], dict[str, Timings]]:
        """Every k of every drafter on the same prompts, and in turns with them the costs of a round: rows, traces by arm and
        timings by drafter."""
        arms, traces, timings = self.drafts_alone(), {}, {name: {} for name in self.drafters}
        for name in self.drafters:
            arms[f"A beside {name}"] = self.baseline()  # every cell is divided by A, so its moment must not be a single one
            arms |= {arm_of(name, k): self.both(name, k) for k in self.config.ks}
        costs = partial(self.time_costs, timings, dict.fromkeys(self.drafters, self.config.ks), repeats=2)
        rows = self.measure(arms, self.prompts.sweep, self.config.seed, between=costs, traces=traces)
        return together(rows, "A"), traces, timings

    def pick(self, name: str, rows: list[dict], traces: dict[str, list[Trace]], costs: Costs) -> Callable[..., float]:
        """What theory makes of a drafter's sweep: the prediction beside every k, and the k that it picks for each rule. Returns
        `predict` of all that is known of its texts, for other costs."""
        out, config, key, ks = self.out, self.config, self.key(name), self.config.ks
        by_k = {k: traces[arm_of(name, k)] for k in ks}
        rounds = [trace for k in ks for trace in by_k[k]]
        kept = self.untimed(name, self.prompts.sweep, keep_probs=True)
        out.costs[key], out.alpha[key], out.by_position[key] = costs, alpha(kept), acceptance_by_position(rounds, max(ks), FEWEST)
        texts = acceptance_of_texts(by_k, self.untimed(name, self.prompts.untimed))
        text = {"n": config.new_tokens, "prefill_seconds": float(np.mean([t.seconds["prefill"] for t in rounds]))}
        of_sweep, of_all = (partial(predict, texts=t, **text) for t in (texts[: len(self.prompts.sweep)], texts))
        table = {k: cell(rows, arm_of(name, k), "A") for k in ks}
        for k, line in table.items():
            line |= {"draft": name, "temperature": self.sampling.temperature, "k": k, "predicted": of_sweep(costs, k=k)}
        out.cells += list(table.values())
        # what the parts say, and not the best of several measurements, which is also the luckiest: that is run beside it
        picked, best = max(ks, key=lambda k: of_all(costs, k=k)), max(ks, key=lambda k: table[k]["speedup"])
        out.best[key] = {"k": picked}
        out.best_k[key] = {"picked": picked, "best": best, "of_best": table[picked]["speedup"] / table[best]["speedup"]}
        if self.sampling.temperature > 0:  # else the two rules are the same
            k, expected = best_as_block(kept, costs, texts, ks)
            out.as_block[key] = {"k": k, "tokens_per_round_expected": expected}
        return of_all

    def confirm(self, predicted: dict[str, Callable[..., float]]) -> list[dict]:
        """Each drafter on fresh prompts at the k that was picked, and in turns with them the costs there, from which ``predicted``
        tells its speed: rows."""
        out, timings = self.out, {name: {} for name in self.drafters}
        arms = {"A": self.baseline(), "A again": self.baseline()} | self.drafts_alone()
        for name in self.drafters:
            arms |= {arm_of(name, k): self.both(name, k) for k in map(out.best_k[self.key(name)].get, ("picked", "best"))}
            if (as_block := out.as_block.get(self.key(name))) is not None:
                arms[arm_of(name, as_block["k"], block)] = self.both(name, as_block["k"], block)
        costs = partial(self.time_costs, timings, {name: [out.best[self.key(name)]["k"]] for name in self.drafters}, repeats=1)
        rows = self.measure(arms, self.prompts.fresh, self.config.seed + 1000, between=costs)
        for name in self.drafters:
            key, line, choice = self.key(name), out.best[self.key(name)], out.best_k[self.key(name)]
            arm, best = arm_of(name, line["k"]), arm_of(name, choice["best"])
            costs = out.final_costs[key] = costs_of(timings[name])
            line |= cell(rows, arm, "A") | {"predicted": predicted[name](costs, k=line["k"]), "acceptance": acceptance(rows, arm)}
            choice["fresh"] = speed_ratio(rows, arm, best)
            if name in self.alone:
                line["draft_alone"] = cell(rows, f"B {name}", "A")
            if (line := out.as_block.get(key)) is not None:
                line |= cell(rows, arm_of(name, line["k"], block), "A")
                line["of_token_wise"] = speed_ratio(rows, line["arm"], arm)
        out.best[self.key("target")] = cell(rows, "A", "A")
        out.aa[f"T={self.sampling.temperature:g}"] = speed_ratio(rows, "A again", "A")
        return rows

    def cells_alone(self, rows: list[dict]) -> list[dict]:
        """Lines of the sweep's table without speculation."""
        where = {"temperature": self.sampling.temperature}
        lines = [cell(rows, f"B {name}", "A") | {"draft": name} | where for name in self.alone]
        return [*lines, cell(rows, "A", "A") | where]

    def key(self, name: str) -> str:
        return f"{name} T={self.sampling.temperature:g}"

    def baseline(self) -> Arm:
        return target_alone(self.target, self.config, self.sampling)

    def drafts_alone(self) -> dict[str, Arm]:
        return {f"B {name}": target_alone(model, self.config, self.sampling) for name, model in self.alone.items()}

    def both(self, name: str, k: int, rule: Rule = token_wise) -> Arm:
        return both(self.target, self.drafters[name], k, self.config, self.sampling, rule)

    def measure(self, arms: dict[str, Arm], prompts: list[list[int]], seed: int, **options) -> list[dict]:
        return measure(arms, prompts, seed=seed, device=self.target.device, **options)

    def untimed(self, name: str, prompts: list[list[int]], keep_probs: bool = False) -> list[Trace]:
        """What happened in a text after each of ``prompts`` with the largest k, untimed; with p and q if they are to be kept."""
        traces = [Trace(keep_probs=keep_probs) for _ in prompts]
        for i, (prompt, trace) in enumerate(zip(prompts, traces)):
            self.both(name, max(self.config.ks))(prompt, Randomness(self.config.seed + i, self.target.device), trace)
        return traces

    def time_costs(self, timings: dict[str, Timings], ks: dict[str, Sequence[int]], repeats: int) -> None:
        """Add to ``timings`` of each drafter, after a text as long as one is in the middle."""
        rule, prompt = ready_rule(token_wise, self.config.passes, self.target.device), self.prompts.sweep[0]
        length = self.config.prompt_tokens + self.config.new_tokens // 2
        text = (prompt * (length // len(prompt) + 1))[:length]
        for name, drafter in self.drafters.items():
            time_parts(self.target, drafter, text, self.sampling, ks[name], repeats=repeats, rule=rule, timings=timings[name])


def once_more(
    target: Transformer, drafters: dict[str, Drafter], data: TokenData, config: BenchConfig, picked: dict[str, dict[str, dict]]
) -> list[dict]:  # fmt: skip
    """A line for every arm that `run` had on fresh prompts with one of ``drafters``, measured anew on the same texts: whatever
    differs is the machine's. ``picked`` has the k of "token-wise" and "block" by keys like "small T=0"."""
    prompts, lines = split_prompts(data, config).fresh, []
    for temperature in config.temperatures:
        sampling = Sampling(temperature)
        baseline = target_alone(target, config, sampling)
        arms, names = {"A": baseline, "A again": baseline}, {"A again": {"draft": None}}
        for name, drafter in drafters.items():
            for rule in (token_wise, block):
                of_rule = "block" if rule is block else "token-wise"
                if (line := picked[of_rule].get(f"{name} T={temperature:g}")) is not None:
                    arms[arm := f"C {name} {of_rule} k={line['k']}"] = both(target, drafter, line["k"], config, sampling, rule)
                    names[arm] = {"draft": name, "rule": of_rule, "k": line["k"]}
        rows = measure(arms, prompts, seed=config.seed + 1000, device=target.device)
        alone = cell(rows, "A", "A")["tokens_per_second"]
        lines += [{"temperature": temperature} | names[arm] | cell(rows, arm, "A") | {"target_alone": alone} for arm in names]
    return lines


@dataclass(frozen=True)
class Ties:
    """Where greedy texts part only because a pass over several rows rounds differently from a pass over one."""

    tokens: int  # positions looked at
    floor: float  # twice the largest change of a top-two margin between one row and several, in logits
    near: int  # positions whose margin is below the floor
    texts: int
    parted: int  # texts in which speculation wrote another token than the target alone
    largest: float  # the largest margin at which one parted; 0 if none did


@torch.inference_mode()
def greedy_ties(target: Transformer, drafter: Drafter, prompts: list[list[int]], *, k: int, new_tokens: int) -> Ties:
    """Greedy texts with and without ``drafter``, and how far rounding moves the target's margins."""
    margins, largest_change, parted_at, n_ids = [], 0.0, [], target.config.n_ids
    options = {"max_new_tokens": new_tokens, "sampling": Sampling(0)}
    for prompt in prompts:
        own = list(generate(target, prompt, **options))
        both = list(speculate(target, prompt, drafter=drafter, k=k, **options))
        text = torch.tensor([prompt + own[:-1]], device=target.device)
        reread = {}
        for m in range(1, k + 2):
            cache = target.new_cache()
            prefill(target, prompt, cache)
            blocks = text[:, len(prompt) - 1 :].split(m, 1)
            reread[m] = torch.cat([target(block, cache)[0, :, :n_ids].float() for block in blocks])  # (new_tokens, V)
        first, second = reread[1].topk(2).indices.unbind(-1)
        margin = {m: rows.gather(1, first[:, None]) - rows.gather(1, second[:, None]) for m, rows in reread.items()}
        largest_change = max(largest_change, *(float((margin[m] - margin[1]).abs().max()) for m in margin))
        margins += margin[1][:, 0].tolist()
        differs = [i for i, (a, b) in enumerate(zip(own, both)) if a != b]
        if differs:
            parted_at.append(float(margin[1][differs[0]]))
    floor = 2 * largest_change
    near = sum(m < floor for m in margins)
    return Ties(len(margins), floor, near, len(prompts), len(parted_at), max(parted_at, default=0.0))
