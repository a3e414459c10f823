"""What theory promises of a measurement: the costs of a round, timed in units of one target step, the acceptance found in some
texts, and the speed-up that follows from both (`theory.py` has the closed forms).

Whether the promise is kept is measured in `bench.py`, which runs whole texts. Nothing here plots or prints.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import theory
from .drafting import Drafter
from .engine import Trace, on_host, prefill
from .inference import draw_next, next_probs
from .model import Transformer
from .sampling import Randomness, Rule, Sampling, block, expected_accepted, token_wise


def clock() -> float:
    """Seconds, after the accelerator has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


class Text(NamedTuple):
    """What a prediction needs to know of a text."""

    alphas: list[float]  # αᵢ, i = 1 … the largest k
    lengths: list[int]  # of the proposals in rounds that had room for the largest k


def acceptance_of_wanted(traces: dict[int, list[Trace]]) -> Text:
    """Of one text, from its traces by k.

    A draft that was wanted but not proposed counts as refused: prompt lookup often finds fewer than k tokens, or none.
    Not wanted is only what the end of the text leaves no room for.
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
    return Text([p / max(1, n) for p, n in zip(passed, reached)], lengths or [k_max])


def acceptance_of_texts(by_k: dict[int, list[Trace]], others: list[Trace]) -> list[Text]:
    """Of each text that was written with every k, and then of ``others``, which were written with the largest only."""
    k_max = max(by_k)
    texts = [{k: [traces[i]] for k, traces in by_k.items()} for i in range(len(by_k[k_max]))]
    return [acceptance_of_wanted(traces) for traces in texts + [{k_max: [trace]} for trace in others]]


def tokens_as_block(traces: list[Trace], k: int) -> float:
    """Tokens a round if the block rule judged the first k drafts of these rounds, of traces that kept their probabilities:
    its expectation given the drafts. Whatever rule wrote the text, the drafts were drawn from the same q."""
    rounds = [r for t in traces for r in t.rounds]
    drafted = [torch.tensor(r.drafted[:k], device=r.target_probs.device) for r in rounds]
    return 1 + float(np.mean([
        expected_accepted(block, x, r.draft_probs[: len(x)], r.target_probs[: len(x) + 1]) for x, r in zip(drafted, rounds)
    ]))  # fmt: skip


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


def gain_of_stopping(kept: list[Trace], costs: Costs, sure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """By how much, relatively, a drafter that stops early is quicker than the best fixed number of drafts, at most: one that
    drafts on until the product of ``sure`` falls below a threshold, the best one in hindsight. Less than 0 if none is as good.

    ``sure`` gives a number (n,) in [0, 1] for rows p and q (n, V). ``kept`` are traces with their probabilities and at least one
    round of the largest k; what a round of fewer drafts yields is its expectation by the token-wise rule given what was drawn.
    """
    k = max(len(r.drafted) for t in kept for r in t.rounds)
    reached, product = [], []
    for r in (r for t in kept for r in t.rounds if len(r.drafted) == k):
        p, q = r.target_probs[:k].double(), r.draft_probs.double()
        drawn = torch.tensor(r.drafted, device=p.device)[:, None]
        reached.append((p.gather(1, drawn) / q.gather(1, drawn)).clamp(max=1)[:, 0].cumprod(0))
        product.append(sure(p, q).cumprod(0))
    tokens, product = 1 + torch.stack(reached).cumsum(1).cpu().numpy(), torch.stack(product).cpu().numpy()  # (rounds, k)
    spent = np.array([costs.draft(n) + costs.verify(n + 1) + costs.o for n in range(1, k + 1)])
    speeds = []
    for least in [*np.geomspace(1e-3, 1, 200), 1 + 1e-9]:
        last = (product[:, :-1] >= least).sum(1)  # index of the last draft
        speeds.append(tokens[np.arange(len(last)), last].mean() / spent[last].mean())
    return float(max(speeds) / (tokens.mean(0) / spent).max() - 1)


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

