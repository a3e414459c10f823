"""The three named sizes of the whole experiment: `ci` (seconds), `cpu` (the default), `seed` (the original, on a GPU).

The only place where such numbers are written. A profile is frozen: to change one thing for an experiment, use
``dataclasses.replace`` and give the result another name.
"""

import math
import os
from dataclasses import dataclass, field, replace

from .data import DataConfig
from .model import ModelConfig


@dataclass(frozen=True)
class Phase:
    """One stretch of training with its own warm-up and its own decay of the learning rate."""

    iterations: int  # optimizer steps
    warmup: int  # steps of linear warm-up at the start of the phase
    learning_rate: float  # peak
    weight_decay: float  # on matrices only
    accumulation: int  # micro-batches per optimizer step
    batch_size: int  # sequences per micro-batch
    evaluate_every: int  # optimizer steps


@dataclass(frozen=True)
class Schedule:
    """How one model is trained: its phases, one after another, and what they share."""

    phases: tuple[Phase, ...]
    block_size: int  # tokens per sequence
    decay: str = "cosine"  # within each phase, down to final_fraction of the peak; or "constant"
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    vocabulary_rate: float = 1.0  # learning rate of embedding and output layer ÷ that of all else (μP, 2203.03466)
    evaluation_batches: int = 8
    checkpoint_seconds: float = 120.0  # at least this often, so that a cut loses little
    compile: bool = False  # torch.compile the training step
    seed: int = 1337

    @property
    def iterations(self) -> int:
        return sum(phase.iterations for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens read by the whole schedule, in one process."""
        return sum(p.iterations * p.accumulation * p.batch_size for p in self.phases) * self.block_size


@dataclass(frozen=True)
class BenchConfig:
    """What the three scenarios are measured on."""

    n_prompts: int  # held-out prompts
    prompt_tokens: int
    new_tokens: int  # per prompt and arm, stop tokens off
    ks: tuple[int, ...]  # drafted tokens per round, swept
    n_sweep_prompts: int  # prompts of the sweep over k, others than those that the k picked is then measured on
    n_untimed_prompts: int = 0  # still others, run once with the longest k: how many drafts are kept depends much on the text
    temperatures: tuple[float, ...] = (0.0, 1.0)
    dtype: str = "auto"  # bfloat16 where the machine multiplies it natively, else float32
    passes: str = "eager"  # or "compiled", "graphs": see inference.ready
    draft_ids: int | None = None  # how many ids a draft offers, the most frequent of the training text; None: all
    seed: int = 2024


@dataclass(frozen=True)
class Profile:
    """Everything that defines one run of the report."""

    name: str
    data: DataConfig
    models: dict[str, ModelConfig]  # "target", "small", "medium"
    schedules: dict[str, Schedule]  # the same keys
    distillation: Schedule  # of a draft; its control gets the same steps of plain cross-entropy
    bench: BenchConfig = field(repr=False)
    divergence: str = "forward-kl"  # of the last phase of a distillation; those before it are always forward KL
    texts: str = "data"  # what a distillation reads: see distill.TEXTS
    own_text: int = 1 << 30  # tokens that a model writes for a distillation, most; more than that are read several times


_CI = Profile(
    name="ci",
    data=DataConfig(source="sotu", max_documents=24, n_merges=255),  # 256 bytes + 255 merges + 1 = 512 ids
    models={
        "target": ModelConfig(3, 4, 64, 2, vocab_size=512, n_ids=512, context=128, dropout=0.0),
        "small": ModelConfig(1, 2, 32, 1, vocab_size=512, n_ids=512, context=128, dropout=0.0),
        "medium": ModelConfig(2, 4, 48, 2, vocab_size=512, n_ids=512, context=128, dropout=0.0),
    },
    schedules={
        role: Schedule((Phase(60, 5, 3e-3, 0.1, 1, 8, 20),), block_size=64, evaluation_batches=2)
        for role in ("target", "small", "medium")
    },
    distillation=Schedule(
        (Phase(20, 5, 2e-3, 0.1, 1, 8, 10), Phase(20, 2, 1e-3, 0.1, 1, 8, 10)), block_size=64, evaluation_batches=2
    ),
    bench=BenchConfig(n_prompts=4, prompt_tokens=16, new_tokens=24, ks=(1, 2, 4), n_sweep_prompts=2, n_untimed_prompts=1),
)

# Smaller than the seed, with few large heads, which two cores train faster than many small ones, and a vocabulary that they
# can afford. The target must not fit into the processors' last caches, in bfloat16 either: 74 MB here. One that does is read
# from there, and there is little left that verifying several rows at once could save.
# Less than one pass over the text, so there is nothing for dropout to regularise.
_CPU = Profile(
    name="cpu",
    data=DataConfig(source="sotu", n_merges=3839),  # 256 bytes + 3839 merges + 1 = 4096 ids
    models={
        "target": ModelConfig(8, 5, 640, 1, vocab_size=4096, n_ids=4096, context=256, dropout=0.0),
        "small": ModelConfig(2, 4, 128, 1, vocab_size=4096, n_ids=4096, context=256, dropout=0.0),
        "medium": ModelConfig(6, 4, 256, 1, vocab_size=4096, n_ids=4096, context=256, dropout=0.0),
    },
    schedules={
        "target": Schedule(
            (Phase(480, 40, 4e-4, 0.1, 1, 4, 60),), block_size=256, vocabulary_rate=9.0, compile=True
        ),
        "small": Schedule((Phase(500, 40, 2e-3, 0.1, 1, 4, 100),), block_size=256, compile=True),
        "medium": Schedule(
            (Phase(200, 40, 8e-4, 0.1, 1, 4, 50),), block_size=256, vocabulary_rate=5.0, compile=True
        ),
    },
    distillation=Schedule(
        (Phase(200, 40, 2e-3, 0.1, 1, 4, 50), Phase(200, 10, 1e-3, 0.1, 1, 4, 50)), block_size=256, compile=True
    ),
    texts="data+target",
    own_text=102_400,  # half of what the last phase reads
    bench=BenchConfig(
        n_prompts=64, prompt_tokens=32, new_tokens=128, ks=(1, 2, 3, 5, 8, 11, 17), n_sweep_prompts=12, n_untimed_prompts=24,
        passes="compiled",
    ),
)

# Phases of 256 sequences a step. The original's target had 32 × 8 of them in its first two; the batch is the same.
_SEED = Profile(
    name="seed",
    data=DataConfig(source="openwebtext", max_bytes=8 << 30),  # all of GPT-2's 50,257 ids
    models={
        "target": ModelConfig(12, 12, 768, 3),
        "small": ModelConfig(2, 4, 256, 1),
        "medium": ModelConfig(6, 8, 512, 2),
    },
    schedules={
        "target": Schedule(
            (
                Phase(10_000, 200, 3e-4, 0.10, 16, 16, 500),
                Phase(30_000, 0, 3e-4, 0.15, 16, 16, 500),
                Phase(50_000, 1_000, 6e-5, 0.10, 16, 16, 500),
                Phase(40_000, 500, 2e-5, 0.08, 16, 16, 500),
            ),
            block_size=1024, vocabulary_rate=3.0, evaluation_batches=16, compile=True,
        ),
        "small": Schedule(
            (Phase(40_000, 1_000, 3e-4, 0.1, 16, 16, 500),), block_size=1024, vocabulary_rate=2.0, evaluation_batches=16,
            compile=True,
        ),
        "medium": Schedule(
            (Phase(40_000, 2_000, 3e-4, 0.1, 16, 16, 500),), block_size=1024, vocabulary_rate=3.0, evaluation_batches=16,
            compile=True,
        ),
    },
    distillation=Schedule(
        (Phase(64_000, 1_000, 3e-4, 0.1, 16, 16, 500), Phase(24_000, 300, 2e-4, 0.1, 16, 16, 500)),
        block_size=1024, vocabulary_rate=2.0, evaluation_batches=16, compile=True,
    ),
    divergence="neg-log-alpha", texts="data+target",
    bench=BenchConfig(
        n_prompts=32, prompt_tokens=64, new_tokens=256, ks=(1, 2, 3, 4, 6, 8, 12), n_sweep_prompts=4, n_untimed_prompts=12,
        passes="compiled", draft_ids=32768,
    ),
)  # fmt: skip

PROFILES = {profile.name: profile for profile in (_CI, _CPU, _SEED)}


def get_profile(name: str | None = None) -> Profile:
    """The profile of that name; None takes $SPECDEC_PROFILE, else `cpu`. ValueError for an unknown name.

    "seed@300M" is the profile `seed` with every schedule shortened alike, so that the target reads 300 million tokens;
    "seed@300M:PATH" also takes the text from local files (the source "text:PATH").
    """
    if name is None:
        name = os.environ.get("SPECDEC_PROFILE") or "cpu"
    base, _, budget = name.partition("@")
    if base not in PROFILES:
        raise ValueError(f"there is no profile {base!r}; choose one of {', '.join(PROFILES)}.")
    budget, _, path = budget.partition(":")
    profile = PROFILES[base]
    if path:
        profile = replace(profile, data=replace(profile.data, source=f"text:{path}"))
    return scaled(profile, count(budget) / profile.schedules["target"].tokens) if budget else profile


def count(text: str) -> float:
    """A number of tokens as people write it: 300M, 1.5B, 20k."""
    units = {"k": 1e3, "M": 1e6, "B": 1e9}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is no number of tokens; write for example 300M or 1.5B.")
    return value


def scaled(profile: Profile, fraction: float) -> Profile:
    """The same phases, each as long as ``fraction`` says.

    A short training wants more and smaller steps at higher rates than a long one: the micro-batches of a step shrink by
    1 ÷ √fraction, to a power of two, and the rates grow by its square root. Of text that is read about once nothing is
    dropped. Shapes stay: each phase's share, its decay, the ratio of the rates.
    """
    fewer = 2 ** max(0, round(math.log2(fraction**-0.5)))

    def shorter(schedule: Schedule) -> Schedule:
        def phase(p: Phase) -> Phase:
            accumulation = max(1, p.accumulation // fewer)
            n = p.accumulation / accumulation
            iterations = max(1, round(p.iterations * fraction * n))
            return replace(
                p,
                iterations=iterations,
                warmup=max(round(p.warmup * fraction * n), iterations // 10 if p.warmup and n > 1 else 0),
                learning_rate=p.learning_rate * n**0.5,
                accumulation=accumulation,
            )

        phases = [phase(p) for p in schedule.phases]
        every = max(1, sum(p.iterations for p in phases) // 20)
        return replace(schedule, phases=tuple(replace(p, evaluate_every=min(p.evaluate_every, every)) for p in phases))

    return replace(
        profile,
        models={r: replace(c, dropout=c.dropout if fraction >= 1 else 0.0) for r, c in profile.models.items()},
        schedules={role: shorter(schedule) for role, schedule in profile.schedules.items()},
        distillation=shorter(profile.distillation),
        own_text=max(1, round(profile.own_text * fraction)),
    )
