"""One training loop for every model and every loss.

Phases with their own warm-up and decay, gradient accumulation and clipping, AdamW, bf16 autocast where the machine has
it, evaluation on fixed held-out windows, checkpoints that a cut training resumes from bit for bit, and data parallelism
under torchrun. The loss is an argument, so distillation (`distill.py`) is the same loop.
"""

import ast
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .checkpoint import clear_training, load_model, load_training, load_weights, save_model, save_training
from .data import TokenData, batch, build_dir, tokens_for, window
from .model import Transformer
from .profiles import Phase, Profile, Schedule


@dataclass(frozen=True)
class Loss:
    """How far a model's logits are from the tokens that follow or, with a ``teacher``, from the teacher's logits."""

    of: Callable[[Tensor, Tensor], Tensor]  # (logits (B, T, V), targets (B, T) or the teacher's logits) → scalar
    teacher: Transformer | None = None

    def __call__(self, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of ids (B, T) with targets (B, T)."""
        if self.teacher is not None:
            with torch.no_grad():
                targets = self.teacher(ids)
        return self.of(model(ids), targets)


@dataclass
class History:
    """What a training left to plot: one row per evaluation."""

    rows: list[dict] = field(default_factory=list)  # iteration, tokens, learning_rate, losses in nats, seconds

    @property
    def validation_loss(self) -> float:
        return self.rows[-1]["validation_loss"]

    @property
    def seconds(self) -> float:
        return self.rows[-1]["seconds"]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


cross_entropy = Loss(negative_log_likelihood)


def train(
    model: Transformer,
    data: TokenData,
    schedule: Schedule,
    *,
    loss: Loss = cross_entropy,
    folder: Path | None = None,
    title: str = "train",
    stop_after: int | None = None,
) -> History:
    """Train ``model`` in place and return its history.

    With a ``folder`` the state is saved there every ``schedule.checkpoint_seconds`` and an interrupted training goes
    on from it. ``stop_after`` ends after so many iterations as if it had been cut, saving the state: for tests.
    Under torchrun every process calls this; a step then sees the processes' micro-batches joined.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, chief = model.device, rank == 0
    autocast = torch.autocast(device.type, torch.bfloat16) if has_bf16(device) else nullcontext()
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = make_optimizer(model, schedule.betas, schedule.vocabulary_rate)
    history, done, seconds = History(), 0, 0.0
    devices = [device] if device.type == "cuda" else []
    # dropout draws from torch's own generator; give it back as it was
    with torch.random.fork_rng(devices=devices), ExitStack() as stack:
        torch.manual_seed(schedule.seed + rank)
        saved = load_training(folder) if folder else None
        if saved:
            load_weights(model, saved["model"], "training.pt")
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            if chief:  # the others keep draws of their own
                torch.set_rng_state(saved["rng"])
            history, done, seconds = History(saved["rows"]), saved["iteration"], saved["seconds"]

        def save():
            if folder and chief:
                save_training(folder, {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": done,
                    "generator": generator.get_state(), "rng": torch.get_rng_state(),
                    "rows": history.rows, "running": running, "seconds": seconds + time.perf_counter() - began,
                })  # fmt: skip

        parallel = DistributedDataParallel(model) if world > 1 else model
        step_loss, models = loss, []
        if schedule.compile:
            step_loss, models = replace(loss, of=compiled(loss.of, device)), [model, loss.teacher]
        stack.enter_context(compiled_blocks(*filter(None, models)))
        began = saved_at = time.perf_counter()
        bar = tqdm(total=schedule.iterations, initial=done, desc=title, disable=not (chief and sys.stderr.isatty()))
        model.train()
        running = [value.to(device) for value in saved["running"]] if saved else []
        for phase, i in steps_from(schedule, done):
            rate = learning_rate(schedule, phase, i)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
                group["weight_decay"] = phase.weight_decay * group["decays"]
            total = 0.0
            for micro in range(phase.accumulation):
                ids, targets = batch(data.train, phase.batch_size * world, schedule.block_size, generator)
                ids, targets = (placed(x[rank::world], device) for x in (ids, targets))
                last = micro == phase.accumulation - 1
                with parallel.no_sync() if world > 1 and not last else nullcontext():
                    with autocast:
                        value = step_loss(parallel, ids, targets) / phase.accumulation
                    value.backward()
                total = total + value.detach()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running.append(total)
            done += 1
            bar.update()
            if done % phase.evaluate_every == 0 or done == schedule.iterations:
                history.rows.append({
                    "iteration": done,
                    "tokens": tokens_until(schedule, done) * world,
                    "learning_rate": rate,
                    "train_loss": torch.stack(running).mean().item(),
                    "validation_loss": evaluate(model, data, schedule),
                    "seconds": seconds + time.perf_counter() - began,
                })  # fmt: skip
                running = []
                bar.set_postfix(validation=f"{history.validation_loss:.3f}")
            if time.perf_counter() - saved_at > schedule.checkpoint_seconds:
                save()
                saved_at = time.perf_counter()
            if done == stop_after:
                save()
                break
        bar.close()
    model.eval()
    return history


def placed(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on that device; a copy to a GPU out of pinned memory does not wait for what the GPU is at."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def steps_from(schedule: Schedule, done: int):
    """(phase, iteration within it) of every step that is left after ``done`` of them."""
    for phase in schedule.phases:
        yield from ((phase, i) for i in range(min(done, phase.iterations), phase.iterations))
        done = max(0, done - phase.iterations)


def learning_rate(schedule: Schedule, phase: Phase, i: int) -> float:
    """Linear warm-up to the phase's peak, then cosine to ``final_fraction`` of it, or constant."""
    if i < phase.warmup:
        return phase.learning_rate * (i + 1) / phase.warmup
    if schedule.decay == "constant":
        return phase.learning_rate
    progress = (i - phase.warmup) / max(1, phase.iterations - phase.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return phase.learning_rate * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)


def tokens_until(schedule: Schedule, iteration: int) -> int:
    """Tokens one process has read after so many iterations."""
    tokens = 0
    for phase in schedule.phases:
        n = min(iteration, phase.iterations)
        tokens += n * phase.accumulation * phase.batch_size * schedule.block_size
        iteration -= n
    return tokens


def make_optimizer(model: Transformer, betas: tuple[float, float], vocabulary_rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone. The loop sets the rates; those of the embedding and the output
    layer, whose rows are seldom trained, are ``vocabulary_rate`` times as high."""
    vocabulary = [model.embedding.weight, model.head.weight]
    matrices = [p for p in model.parameters() if p.dim() >= 2 and all(p is not v for v in vocabulary)]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "decays": 1.0, "rate": 1.0},
        {"params": vocabulary, "decays": 1.0, "rate": vocabulary_rate},
        {"params": others, "decays": 0.0, "rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


@torch.no_grad()
def evaluate(model: Transformer, data: TokenData, schedule: Schedule) -> float:
    """Mean nats per token on held-out windows, the same windows every time."""
    was_training = model.training
    model.eval()
    size = schedule.phases[-1].batch_size
    starts = held_out_starts(data, schedule.evaluation_batches * size, schedule.block_size)
    losses = []
    with torch.autocast(model.device.type, torch.bfloat16) if has_bf16(model.device) else nullcontext():
        for i in range(0, len(starts), size):
            ids, targets = window(data.validation, starts[i : i + size], schedule.block_size)
            losses.append(cross_entropy(model, ids.to(model.device), targets.to(model.device)))
    model.train(was_training)
    return torch.stack(losses).mean().item()


def held_out_starts(data: TokenData, n: int, length: int) -> list[int]:
    """Where n windows of ``length`` tokens start, evenly spread over the held-out text; the same every time."""
    last = len(data.validation) - length - 1
    if last < 0:
        raise ValueError(f"{len(data.validation)} held-out tokens are too few for windows of {length}; use more text.")
    return [i * last // max(1, n - 1) for i in range(n)]  # in integers: float32 misses by some tokens above 2²⁴


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the machine multiplies bfloat16 natively, so that it is faster than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False  # oneDNN would emulate it
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_compile(device: torch.device | str = "cpu") -> bool:
    """On the CPU torch.compile needs the C++ compiler that it would call, and Python's headers."""
    if torch.device(device).type == "cuda":
        return True
    return shutil.which(compiler()) is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def compiler() -> str:
    """The C++ compiler, without what else CXX may say: torch takes one word only, and "ccache g++" for its name."""
    words = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")]
    return words[-1] if words else "clang++" if sys.platform == "darwin" else "g++"


def compiled(function, device: torch.device | str = "cpu", **options):
    """torch.compile where it can; otherwise the function itself, slower and no different."""
    if not can_compile(device):
        return function
    torch._dynamo.config.recompile_limit = 64  # several models go through the same code in one process
    torch._inductor.config.cpp.cxx = None, compiler()
    return torch.compile(function, **options)


@contextmanager
def compiled_blocks(*models: Transformer):
    """Every block of these models compiled while this lasts. Blocks of one shape share one program: it is ready much
    sooner than one of a whole model, and as fast."""
    blocks = [block for model in models for block in model.blocks]
    for block in blocks:
        block.forward = compiled(block.forward, next(block.parameters()).device, dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def load_or_train(profile: Profile, role: str, *, device: str | torch.device = "cpu") -> tuple[Transformer, History]:
    """The model of that role ("target", "small" or "medium"), trained if it is not there yet, in eval mode."""
    if role not in profile.models:
        raise ValueError(f"the profile {profile.name!r} has no model {role!r}; choose {', '.join(profile.models)}.")
    schedule, data = profile.schedules[role], tokens_for(profile)
    parts = {"model": asdict(profile.models[role]), "schedule": asdict(schedule), "data": data.sha256}

    def make() -> Transformer:
        return Transformer(profile.models[role], torch.Generator().manual_seed(schedule.seed)).to(device)

    return trained(profile, role, parts, make, data, schedule, cross_entropy, device)


def trained(
    profile: Profile,
    name: str,
    parts: dict,
    make: Callable[[], Transformer],
    data: TokenData,
    schedule: Schedule,
    loss: Loss,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, History]:
    """Load the checkpoint that ``parts`` and today's sources name, or train it; a cut training is taken up again."""
    parts = parts | {"sources": _SOURCES}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    folder = build_dir() / profile.name / "checkpoints" / f"{name}-{key}"
    if (folder / "config.json").exists():
        model, info = load_model(folder, device)
        return model, History(info["history"])
    model = make()
    history = train(model, data, schedule, loss=loss, folder=folder, title=f"{profile.name} {name}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_model(model, folder, {"history": history.rows, "made_from": parts})
        clear_training(folder)
    if dist.is_initialized():
        dist.barrier()  # nobody looks for the checkpoint before it is there
    return model.eval(), history


@cache
def source_key(*modules: str) -> str:
    """Hash of what the named modules of this package do: their syntax trees without comments and docstrings.

    Asked for on import and remembered, because a file that is edited during a training is not what trains.
    """
    digest = hashlib.sha256()
    for name in modules:
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


_SOURCES = source_key("data", "model", "train")
