"""Measurement of the three scenarios: A the target alone, B the draft alone, C both.

All arms run in one process, prompt by prompt in rotated order, so that a slow minute hits each of them. Ratios are of
totals, never means of ratios; intervals come from a paired bootstrap over prompts. Costs are measured in the units of
`theory.py`, so that the prediction stands beside the measurement. Nothing here plots or prints.
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
from .engine import Trace, generate, on_host, prefill, speculate
from .inference import draw_next, next_probs, ready, ready_rule, trimmed
from .model import Transformer
from .profiles import BenchConfig
from .sampling import Randomness, Rule, Sampling, block, expected_accepted, token_wise

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
    text in ten no more, for where processors are taken away all the time there is nothing better to wait for. ``traces``
    receives what each arm did, prompt by prompt; ``between`` is called after each prompt.
    """
    names, rows = list(arms), []
    order = [(-1, p) for p in prompts[:warmup]] + list(enumerate(prompts))
    spare = max(2, len(order) * len(names) // 10)
    for i, prompt in tqdm(order, desc="measure", disable=not sys.stderr.isatty(), leave=False):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            for attempt in range(3):
                trace, before = Trace(clock=time.perf_counter), stolen()
                began = clock()
                arms[name](prompt, Randomness(seed + i, device), trace)
                seconds = clock() - began
                if stolen() == before or attempt == 2 or spare == 0:
                    break
                spare -= 1
            if i >= 0:
                rows.append({"arm": name, "prompt": i, "seconds": seconds} | summary([trace]))
                if traces is not None:
                    traces.setdefault(name, []).append(trace)
        between()
    return rows


def clock() -> float:
    """Seconds, after the accelerator has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


def acceptance_by_position(traces: list[Trace], k: int) -> list[float]:
    """αᵢ, i = 1 … k: how often the i-th draft of a round is accepted, given that all before it were; NaN where none came."""
    rounds = [r for t in traces for r in t.rounds]
    reached = [sum(len(r.drafted) >= i and r.accepted >= i - 1 for r in rounds) for i in range(1, k + 1)]
    passed = [sum(r.accepted >= i for r in rounds) for i in range(1, k + 1)]
    return [p / n if n else float("nan") for p, n in zip(passed, reached)]


def acceptance_of_wanted(traces: dict[int, list[Trace]]) -> tuple[list[float], list[int]]:
    """What a prediction needs, from traces of one text by k: αᵢ for i up to the largest k, and lengths of proposals.

    A draft that was wanted but not proposed counts as refused: prompt lookup often finds fewer than k tokens, or none.
    Not wanted is only what the end of the text leaves no room for. The lengths are of the proposals in rounds that had
    room for the largest k.
    """
    k_max = max(traces)
    reached, passed, lengths = [0] * k_max, [0] * k_max, []
    for k, trace, r in ((k, t, r) for k, ts in traces.items() for t in ts for r in t.rounds):
        wanted = min(k, len(trace.prompt) + len(trace.tokens) - r.start - 1)
        for i in range(min(wanted, r.accepted + 1)):
            reached[i] += 1
            passed[i] += r.accepted > i
        if wanted == k_max:
            lengths.append(len(r.drafted))
    return [p / max(1, n) for p, n in zip(passed, reached)], lengths


Text = tuple[list[float], list[int]]  # what `predict` needs of one: its αᵢ and the lengths of proposals


def acceptance_of_texts(by_k: dict[int, list[Trace]], others: list[Trace]) -> list[Text]:
    """Of each text that was written with every k, and then of ``others``, which were written with the largest only."""
    k_max = max(by_k)
    texts = [{k: [traces[i]] for k, traces in by_k.items()} for i in range(len(by_k[k_max]))]
    texts += [{k_max: [trace]} for trace in others]
    return [(alphas, lengths or [k_max]) for alphas, lengths in map(acceptance_of_wanted, texts)]


def alpha(traces: list[Trace]) -> float:
    """Mean overlap Σ min(p, q) over the examined positions of traces that kept their probabilities."""
    overlaps = []
    for r in (r for t in traces for r in t.rounds):
        n = min(r.accepted + 1, len(r.drafted))
        overlaps += theory.overlap(r.target_probs[:n], r.draft_probs[:n]).tolist()
    return float(np.mean(overlaps))


def tokens_as_block(traces: list[Trace], k: int) -> float:
    """Tokens a round if the block rule judged the first k drafts of these rounds, of traces that kept their probabilities:
    its expectation given the drafts. Whatever rule wrote the text, the drafts were drawn from the same q."""
    rounds = [r for t in traces for r in t.rounds]
    drafted = [torch.tensor(r.drafted[:k], device=r.target_probs.device) for r in rounds]
    return 1 + float(np.mean([
        expected_accepted(block, x, r.draft_probs[: len(x)], r.target_probs[: len(x) + 1]) for x, r in zip(drafted, rounds)
    ]))  # fmt: skip


def together(rows: list[dict], arm: str) -> list[dict]:
    """``rows`` with those of the arms "``arm`` beside …" added up to one of ``arm`` for each prompt."""
    sums, others = {}, []
    for row in rows:
        if not row["arm"].startswith(f"{arm} beside "):
            others.append(row)
            continue
        total = sums.setdefault(row["prompt"], dict.fromkeys(row, 0) | {"arm": arm, "prompt": row["prompt"]})
        for key in row.keys() - {"arm", "prompt"}:
            total[key] += row[key]
    return [*sums.values(), *others]


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

    return _bootstrap(ratio, len(prompts), samples, seed)


def acceptance(rows: list[dict], arm: str, *, samples: int = 2000, seed: int = 0) -> dict:
    """Accepted ÷ examined drafts of ``arm``: {"value", "ci95"}, a bootstrap over prompts. Under the token-wise rule its
    expectation is α at the examined positions."""
    mine = [r for r in rows if r["arm"] == arm]
    accepted, examined = (np.array([r[key] for r in mine], dtype=float) for key in ("accepted", "examined"))
    return _bootstrap(lambda i: accepted[i].sum(-1) / examined[i].sum(-1).clip(1), len(mine), samples, seed)


def _bootstrap(ratio: Callable, n: int, samples: int, seed: int) -> dict:
    """``ratio`` of indices (…, n) of prompts, and where 95% of it lies when they are drawn anew."""
    low, high = np.percentile(ratio(np.random.default_rng(seed).integers(n, size=(samples, n))), [2.5, 97.5])
    return {"value": float(ratio(np.arange(n))), "ci95": [float(low), float(high)]}


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
    drafts: dict[int, float]  # k draft steps of a round ÷ one target step; the first is slower, its weights are not at hand
    v: dict[int, float]  # a verifying pass over m rows, probabilities included ÷ one target step
    o: float  # the decision about the middle one of the measured k, told to the host ÷ one target step

    @property
    def c(self) -> float:
        """One draft step of a long round ÷ one target step."""
        k = max(self.drafts)
        return self.drafts[k] / k

    def draft(self, k: int) -> float:
        """k draft steps, interpolated between the measured k."""
        return float(np.interp(k, [0, *self.drafts], [0, *self.drafts.values()]))

    def verify(self, m: int) -> float:
        """v(m), interpolated between the measured m."""
        return float(np.interp(m, list(self.v), list(self.v.values())))


def mean_verdict(costs: Costs, lengths: list[int], m: int) -> float:
    """v(m) + o of a drafter whose proposals are sometimes shorter than the m − 1 tokens that it was asked for. Where it
    proposes none, nothing is decided."""
    rows = [min(m, n + 1) for n in lengths]
    return float(np.mean([costs.verify(m) + costs.o * (m > 1) for m in rows]))


def predict(costs: Costs, texts: list[Text], *, k: int, n: int, prefill_seconds: float) -> float:
    """The speed-up that ``costs`` promise for texts of n tokens like these, which differ more from each other than their rounds
    do."""
    spent = [theory.text_cost(n, alphas, k, costs.draft, partial(mean_verdict, costs, lengths)) for alphas, lengths in texts]
    prefill = prefill_seconds / costs.step_seconds
    return (prefill + n) / (prefill + float(np.mean(spent)))


def best_as_block(kept: list[Trace], costs: Costs, texts: list[Text], ks: Sequence[int]) -> tuple[int, float]:
    """The k at which a round by the block rule writes the most tokens for what it costs, and how many: expected from ``kept``,
    traces with their probabilities, by whatever rule."""
    spent = {k: costs.draft(k) + np.mean([mean_verdict(costs, lengths, k + 1) for _, lengths in texts]) for k in ks}
    expected = {k: tokens_as_block(kept, k) for k in ks}
    k = max(ks, key=lambda k: expected[k] / spent[k])
    return k, expected[k]


Timings = dict[tuple[str, int], list[float]]  # seconds of ("target", 1), ("draft", k), ("verify", rows), ("decide", k)


@torch.inference_mode()
def time_parts(
    target: Transformer, drafter: Drafter, prompt: list[int], sampling: Sampling, ks: Sequence[int], repeats: int = 8,
    rule: Rule = token_wise, timings: Timings | None = None,
) -> Timings:  # fmt: skip
    """Interleaved timings of a round's parts after ``prompt``, for each of ``ks``; given ``timings`` are added to, three for
    each of ``repeats``.

    Each part follows what it follows in a text, because what ran before it decides what the processor's caches hold: a
    target step other steps, a verifying pass the drafting, and both the draft and the decision a verifying pass; and that
    for some rounds, because a cache may keep a part of the weights from one to the next.
    """
    k_max, middle = max(ks), sorted(ks)[len(ks) // 2]
    randomness, cache = Randomness(0, target.device), target.new_cache()
    text = prompt + prompt[-1:]  # the last token is unread, as after every round
    prefill(target, text, cache)
    drafter.start()
    newest = torch.tensor(text[-1:], device=target.device)
    drafted = torch.tensor([prompt[i % len(prompt)] for i in range(k_max)], device=target.device)

    def step():
        return int(draw_next(target, newest[None], cache, sampling, randomness)[0])

    def verify(m):
        return step() if m == 1 else next_probs(target, torch.cat([newest, drafted[: m - 1]])[None], cache, sampling)

    def judged():
        nonlocal p
        p = verify(middle + 1)

    p = verify(k_max + 1)
    q = p[:-1].roll(1, 0)
    drafted = torch.cat([randomness.choose(row) for row in q])
    q, some = q[:middle], drafted[:middle]

    def draft(k):
        return drafter.propose(text, k, sampling, randomness)

    def decide():
        accepted, following = rule(some, q, p, randomness)
        return on_host(accepted, some, following)

    work = {("target", 1): (step, step), ("decide", middle): (judged, decide)}
    work |= {("draft", k): (partial(verify, k + 1), partial(draft, k)) for k in sorted(ks)}
    work |= {("verify", m): (partial(draft, max(1, m - 1)), partial(verify, m)) for m in [1, *(k + 1 for k in sorted(ks))]}
    timings = {} if timings is None else timings
    for _ in range(repeats):
        for name, (before, function) in work.items():
            seconds = []
            pairs = 24 if function is step else 6  # nothing else runs between steps, and a text has many
            for part in (before, function) * pairs:
                cache.truncate(len(prompt))
                drafter.truncate(len(prompt))
                began = clock()
                part()
                seconds.append(clock() - began)
            timings.setdefault(name, []).extend(seconds[-5::2])  # of `function`; what came before it warmed up, or captured
    return timings


def costs_of(timings: Timings) -> Costs:
    """In target steps. Means, because a text takes the sum of its rounds, whose parts are often quick and sometimes slow;
    without the slowest tenth and the quickest, which are somebody else's."""
    mean = {name: float(np.mean(np.sort(v)[len(v) // 10 : len(v) - len(v) // 10])) for name, v in timings.items()}
    one = mean["target", 1]
    steps = {part: {n: t / one for (of, n), t in mean.items() if of == part} for part in ("draft", "verify", "decide")}
    return Costs(one, steps["draft"], steps["verify"], *steps["decide"].values())


@dataclass
class Benchmark:
    """What `run` measured. ``cells`` and ``rows`` are tables, one dict a line; keys are like "small T=0"."""

    cells: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    costs: dict[str, Costs] = field(default_factory=dict)  # by drafter and temperature, beside the sweep
    final_costs: dict[str, Costs] = field(default_factory=dict)  # beside the fresh prompts, of the k that is run there
    by_position: dict[str, list[float]] = field(default_factory=dict)  # αᵢ over all k
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


def split_prompts(data: TokenData, config: BenchConfig) -> Prompts:
    """As many prompts of each kind as ``config`` says."""
    sizes = config.n_sweep_prompts, config.n_untimed_prompts, config.n_prompts
    left, chosen = held_out_prompts(data, sum(sizes), config.prompt_tokens), []
    for size in sizes:
        taken = left[:: len(left) // size][:size] if size else []
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
    prompts = split_prompts(data, config)
    length = config.prompt_tokens + config.new_tokens // 2
    typical = (prompts.sweep[0] * (length // config.prompt_tokens + 1))[:length]  # as long as a text is in the middle
    out, k_max, device = Benchmark(), max(config.ks), target.device
    rule = ready_rule(token_wise, config.passes, device)
    for temperature in config.temperatures:
        sampling, tag = Sampling(temperature), f"T={temperature:g}"
        baseline = target_alone(target, config, sampling)
        arms = {f"B {name}": target_alone(model, config, sampling) for name, model in alone.items()}
        for name, drafter in drafters.items():
            arms[f"A beside {name}"] = baseline  # every cell is divided by A, so its moment must not be a single one
            arms |= {f"C {name} k={k}": both(target, drafter, k, config, sampling) for k in config.ks}
        traces, timings, timings_again = {}, {name: {} for name in drafters}, {name: {} for name in drafters}

        def time_costs(timings, ks, repeats):
            for name, drafter in drafters.items():
                time_parts(target, drafter, typical, sampling, ks(name), repeats=repeats, rule=rule, timings=timings[name])

        beside = partial(time_costs, timings, lambda name: config.ks, 2)
        rows = together(measure(arms, prompts.sweep, seed=config.seed, device=device, traces=traces, between=beside), "A")
        finals = {"A": baseline, "A again": baseline} | {name: arms[name] for name in arms if name.startswith("B ")}
        predicted = {}
        for name, drafter in drafters.items():
            key = f"{name} {tag}"
            costs = out.costs[key] = costs_of(timings[name])
            by_k = {k: traces[f"C {name} k={k}"] for k in config.ks}
            rounds = [trace for k in config.ks for trace in by_k[k]]
            out.by_position[key] = acceptance_by_position(rounds, k_max)
            kept = untimed(target, drafter, prompts.sweep, k_max, config, sampling, keep_probs=True)
            out.alpha[key] = alpha(kept)
            texts = acceptance_of_texts(by_k, untimed(target, drafter, prompts.untimed, k_max, config, sampling))
            prefill = float(np.mean([t.seconds["prefill"] for t in rounds]))
            of_sweep, predicted[name] = (
                partial(predict, texts=these, n=config.new_tokens, prefill_seconds=prefill)
                for these in (texts[: len(prompts.sweep)], texts)
            )
            table = {k: cell(rows, f"C {name} k={k}", "A") for k in config.ks}
            for k, line in table.items():
                line |= {"draft": name, "temperature": temperature, "k": k, "predicted": of_sweep(costs, k=k)}
            best = max(table, key=lambda k: table[k]["speedup"])
            picked = max(table, key=lambda k: predicted[name](costs, k=k))
            out.best_k[key] = {"picked": picked, "best": best, "of_best": table[picked]["speedup"] / table[best]["speedup"]}
            # what the parts say, and not the best of several measurements, which is also the luckiest: that is run beside it
            out.best[key] = {"k": picked}
            finals |= {arm: arms[arm] for arm in (f"C {name} k={picked}", f"C {name} k={best}")}
            if temperature > 0:  # else the two rules are the same
                k, expected = best_as_block(kept, costs, texts, config.ks)
                out.as_block[key] = {"k": k, "tokens_per_round_expected": expected}
                finals[f"C {name} block k={k}"] = both(target, drafter, k, config, sampling, block)
            out.cells += list(table.values())
        for name in alone:
            out.cells.append(cell(rows, f"B {name}", "A") | {"draft": name, "temperature": temperature})
        out.cells.append(cell(rows, "A", "A") | {"temperature": temperature})
        beside = partial(time_costs, timings_again, lambda name: [out.best[f"{name} {tag}"]["k"]], 1)
        again = measure(finals, prompts.fresh, seed=config.seed + 1000, device=device, between=beside)
        for name in drafters:
            line = out.best[f"{name} {tag}"]
            line |= cell(again, f"C {name} k={line['k']}", "A")
            costs = out.final_costs[f"{name} {tag}"] = costs_of(timings_again[name])
            line |= {"predicted": predicted[name](costs, k=line["k"]), "acceptance": acceptance(again, f"C {name} k={line['k']}")}
            if name in alone:
                line["draft_alone"] = cell(again, f"B {name}", "A")
            if (by := out.as_block.get(f"{name} {tag}")) is not None:
                by |= cell(again, f"C {name} block k={by['k']}", "A")
                by["of_token_wise"] = speed_ratio(again, f"C {name} block k={by['k']}", f"C {name} k={line['k']}")
            choice = out.best_k[f"{name} {tag}"]
            choice["fresh"] = speed_ratio(again, *(f"C {name} k={choice[which]}" for which in ("picked", "best")))
        out.best[f"target {tag}"] = cell(again, "A", "A")
        out.aa[tag] = speed_ratio(again, "A again", "A")
        for part, measured in (("sweep", rows), ("final", again)):
            out.rows += [{"temperature": temperature, "part": part} | r for r in measured]
        out.sweep_errors = agreement([line for line in out.cells if "predicted" in line])
        out.fresh_errors = agreement([line for line in out.best.values() if "predicted" in line])
        after(out)
    return out


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


def untimed(
    target: Transformer, drafter: Drafter, prompts: list[list[int]], k: int, config: BenchConfig, sampling: Sampling,
    keep_probs: bool = False,
) -> list[Trace]:  # fmt: skip
    """What happened in a text after each of ``prompts``, untimed; with every row of p and q if they are to be kept."""
    traces = [Trace(keep_probs=keep_probs) for _ in prompts]
    for i, (prompt, trace) in enumerate(zip(prompts, traces)):
        both(target, drafter, k, config, sampling)(prompt, Randomness(config.seed + i, target.device), trace)
    return traces


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


def agreement(lines: list[dict]) -> dict:
    """How well "predicted" of these lines tells "speedup": R², how far it lies above on average (relative), and in how many of
    the n lines it lies within the interval measured."""
    errors = [line["predicted"] / line["speedup"] - 1 for line in lines]
    within = sum(line["ci95_low"] <= line["predicted"] <= line["ci95_high"] for line in lines)
    r2 = r_squared([line["speedup"] for line in lines], [line["predicted"] for line in lines])
    return {"r2": r2, "mean_error": float(np.mean(errors)), "within": within, "n": len(lines)}


def r_squared(measured: list[float], predicted: list[float]) -> float:
    """1 − Σ(measured − predicted)² / Σ(measured − mean)², of the prediction itself, not of a line fitted to it."""
    y, f = np.array(measured), np.array(predicted)
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - f) ** 2).sum() / total) if total else float("nan")

