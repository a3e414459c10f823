"""How fast decoding could be at best: one token reads every weight once, and memory has a speed.

Random weights will do, because speed does not depend on what a model has learned. Nothing here plots or prints.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from .inference import Model, draw_next, next_probs, ready
from .model import ModelConfig, Transformer
from .prediction import clock
from .profiles import Profile, get_profile
from .sampling import Randomness, Sampling


@dataclass(frozen=True)
class Step:
    """One decoding step of one model beside the floor that reading its bytes sets."""

    model: str
    dtype: str
    bytes: int  # weights and cached keys and values that one token reads
    bandwidth: float  # bytes per second, median of a read before each of its steps
    bandwidth_most: float  # of all reads
    seconds: float  # median of a step, sampling included
    rows: dict[int, float]  # v(m): a pass over m rows ÷ a step

    @property
    def floor_seconds(self) -> float:
        return self.bytes / self.bandwidth

    @property
    def fraction(self) -> float:
        """How much of the floor's speed is reached; 1 is all of it."""
        return self.floor_seconds / self.seconds


def reader(device: str | torch.device = "cpu", megabytes: int = 512) -> Callable[[], float]:
    """A function that reads once through a block that no cache holds, and returns bytes per second."""
    block = torch.ones(megabytes << 18, dtype=torch.float32, device=device)

    def read() -> float:
        began = clock()
        block.sum()
        return block.nbytes / (clock() - began)

    return read


def bytes_per_token(model: ModelConfig | Transformer, length: int, itemsize: int = 2) -> int:
    """Bytes that decoding one token reads after ``length`` others: all weights but the embedding, and the cache."""
    config = model if isinstance(model, ModelConfig) else model.config
    with torch.device("meta"):
        weights = Transformer(config).n_params(read_per_token=True)
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_size * length
    return itemsize * (weights + cache)


@torch.inference_mode()
def measure_steps(
    fast: dict[str, Model], *, length: int = 64, rows: tuple[int, ...] = (2, 5, 9), repeats: int = 24,
    sampling: Sampling = Sampling(),
) -> list[Step]:  # fmt: skip
    """A `Step` of every model, made ready before, after ``length`` tokens, timed in turns, a read of memory before each; of
    the one named "target" also passes over so many ``rows``, which drafts never make."""
    out, work, caches, timings = [], {}, {}, {}
    device = next(iter(fast.values())).device
    read = reader(device)
    randomness = Randomness(0, device)
    ids = torch.zeros(1, max((length, *rows)), dtype=torch.long, device=device)

    def step(model, cache, m):
        if m == 1:
            return int(draw_next(model, ids[:, :1], cache, sampling, randomness)[0])
        return next_probs(model, ids[:, :m], cache, sampling)

    for name, model in fast.items():
        caches[name] = model.new_cache()
        model(ids[:, :length], caches[name])
        several = rows if name == "target" else ()
        work |= {(name, m): partial(step, model, caches[name], m) for m in (1, *several)}
    for i in range(repeats + 3):
        for (name, m), function in work.items():
            # before each step, for a machine that is shared has slow moments and fast ones, and a step's floor is that of its
            # moment; and so that no step finds more in the processor's caches than another
            speed = read()
            caches[name].truncate(length)
            began = clock()
            function()
            seconds = clock() - began
            if i >= 3:
                timings.setdefault((name, m), []).append((seconds, speed))
    most = max(speed for values in timings.values() for _, speed in values)
    median = {key: np.median(values, axis=0).tolist() for key, values in timings.items()}
    for name, model in fast.items():
        (one, bandwidth), size = median[name, 1], torch.empty(0, dtype=model.dtype).element_size()
        dtype, n_bytes = str(model.dtype).removeprefix("torch."), bytes_per_token(model.config, length, size)
        ratios = {m: seconds / one for (of, m), (seconds, _) in median.items() if of == name and m > 1}
        out.append(Step(name, dtype, n_bytes, bandwidth, most, one, ratios))
    return out


@torch.inference_mode()
def seconds_by_length(fast: Model, lengths: list[int], repeats: int = 12) -> dict[int, float]:
    """Median seconds of one decoding step after so many tokens, of a model made ready: flat, but for attention itself."""
    cache, randomness, sampling = fast.new_cache(), Randomness(0, fast.device), Sampling()
    ids = torch.zeros(1, max(lengths), dtype=torch.long, device=fast.device)
    fast(ids[:, : max(lengths) - 1], cache)  # every row is there; a shorter text is the same cache cut short
    timings = {n: [] for n in lengths}
    for i in range(repeats + 3):
        for n in lengths:
            cache.length = n - 1  # downwards and up again: the rows beyond were all written
            began = clock()
            int(draw_next(fast, ids[:, :1], cache, sampling, randomness)[0])
            if i >= 3:
                timings[n].append(clock() - began)
    return {n: float(np.median(values)) for n, values in timings.items()}


def survey(
    profile: Profile, large: str = "seed", fast: dict[str, Model] | None = None, device: str | torch.device = "cpu"
) -> list[dict]:
    """Rows of `as_rows` for the models of ``profile`` (``fast``, if they are ready already) and of the profile ``large``.
    Random weights do."""
    measured, passes = [], profile.bench.passes
    for name, models in [(profile.name, fast)] + [(large, None)] * (large != profile.name):
        configs = get_profile(name).models
        models = models or {role: ready(Transformer(c).to(device), profile.bench.dtype, passes) for role, c in configs.items()}
        measured.append((name, measure_steps(models)))
    return [{"sizes": name, "passes": passes} | row for name, steps in measured for row in as_rows(steps)]


def as_rows(steps: list[Step]) -> list[dict]:
    """The steps as one flat dict each, for a table."""
    return [
        {key: value for key, value in asdict(s).items() if key != "rows"}
        | {"floor_seconds": s.floor_seconds, "fraction": s.fraction}
        | {f"v{m}": v for m, v in s.rows.items()}
        for s in steps
    ]
