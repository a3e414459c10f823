"""Distillation: the draft learns the target's distribution instead of the text, because that is what alpha measures.

α = 1 − TV(p, q), so total variation trains the metric itself, but its gradient vanishes where q is far from p; that of
−log α is the same divided by α, which restores it (LK losses, 2602.23881). Forward KL goes first in either case. The text
may be the data's, or what one of the models writes itself (DistillSpec, Zhou et al. 2023, 2310.08461, on which text and
which divergence suit a task). Every comparison is against a control: the same start and steps with plain cross-entropy,
since otherwise a gain may only be more training.
"""

import copy
import hashlib
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import put_in_place
from .data import TokenData, build_dir, tokens_for, window
from .inference import ready
from .model import Transformer
from .profiles import Profile, Schedule
from .sampling import Sampling
from .theory import overlap
from .train import History, Loss, cross_entropy, has_bf16, held_out_starts, load_or_train, source_key, trained

_SOURCES = source_key("distill")
_WRITERS = source_key("data", "distill", "inference", "model", "native", "sampling")  # of a model's own text
DIVERGENCES = ("forward-kl", "total-variation", "neg-log-alpha")
# whose text the models are compared on while they are trained: the data's or what one of them writes; with a plus the data's,
# and in the last phase of the schedule, half and half with them, what the target writes as it is going to be used
TEXTS = ("data", "draft", "target", "data+target")


def distillation_loss(teacher: Transformer, kind: str) -> Loss:
    """How far the student's q is from the teacher's p at every position, in nats.

    The teacher runs in bf16 where the machine has it; padding ids are left out of both distributions.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"there is no divergence {kind!r}; choose one of {', '.join(DIVERGENCES)}.")
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    if has_bf16(teacher.device):
        teacher = teacher.bfloat16()
    return Loss(partial(divergence, kind, teacher.config.n_ids), teacher)


def divergence(kind: str, n_ids: int, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean divergence of q from p over all positions, of logits (B, T, V) of which the first ``n_ids`` count."""
    p, q = (logits[..., :n_ids].float().log_softmax(-1) for logits in (target_logits, draft_logits))
    if kind == "forward-kl":
        return (p.exp() * (p - q)).sum(-1).mean()
    if kind == "total-variation":
        return 0.5 * (p.exp() - q.exp()).abs().sum(-1).mean()
    return -torch.minimum(p.exp(), q.exp()).sum(-1).log().mean()


def load_or_distill(
    profile: Profile, kind: str | None = None, *, role: str = "small", texts: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, History]:  # fmt: skip
    """The draft of that role, trained further on the target by ``kind``; "cross-entropy" is the control.

    Another divergence than forward KL takes over in the last phase of the profile's schedule, as other text does where
    ``texts`` says so (see `TEXTS`). None, for either, is the profile's own choice. The control learns from data, in as many
    trainings of as many steps.
    """
    kind = kind or profile.divergence
    if kind not in ("cross-entropy", *DIVERGENCES):
        raise ValueError(f"there is no divergence {kind!r}; choose one of {', '.join(DIVERGENCES)} or cross-entropy.")
    texts = texts or profile.texts
    if texts not in TEXTS:
        raise ValueError(f"there is no text of {texts!r}; choose one of {', '.join(TEXTS)}.")
    apart = texts == "data+target"
    if kind == "cross-entropy":
        texts, apart = "data", apart or profile.divergence != "forward-kl"
    data = tokens_for(profile)
    target, _ = load_or_train(profile, "target", device=device)
    student, _ = load_or_train(profile, role, device=device)
    parts = {
        "models": [asdict(profile.models["target"]), asdict(profile.models[role])],
        "schedules": [asdict(profile.schedules["target"]), asdict(profile.schedules[role])],
        "data": data.sha256,
        "distill": _SOURCES,
    }
    own = data
    if texts != "data":
        writer = student if texts == "draft" else target
        asked = _own_text(profile, writer, texts == "data+target")
        parts["texts"] = [texts, *asked, _WRITERS]
        whose = f"draft-{role}" if texts == "draft" else texts  # the target writes once for all drafts
        text = _written_once(writer, data, profile, whose, asked)
        own = replace(data, train=np.concatenate([text, data.train[: len(text)]]) if texts == "data+target" else text)
    rows, stages = [], stages_of(profile.distillation, kind, apart)
    for i, (name, schedule) in enumerate(stages):
        parts[f"stage {len(parts)}"] = [name, asdict(schedule)]
        loss = cross_entropy if name == "cross-entropy" else distillation_loss(target, name)
        start, text = student, data if texts == "data+target" and i < len(stages) - 1 else own
        student, history = trained(profile, f"{role}-{name}", dict(parts), lambda: start, text, schedule, loss, device)
        rows += continued(rows, history.rows)
    return student, History(rows)


def stages_of(schedule: Schedule, kind: str, apart: bool = False) -> list[tuple[str, Schedule]]:
    """What is trained by which loss: everything by one, or forward KL first and ``kind`` in the last phase, which stands
    ``apart`` in any case if it is to read other text.

    Each has a seed of its own. With the one that the draft was trained by, the control would read the same batches in the same
    order once more, and what it gained would be less than more training gains.
    """
    stages = [(kind, schedule)]
    if len(schedule.phases) > 1 and (apart or kind not in ("cross-entropy", "forward-kl")):
        first, last = replace(schedule, phases=schedule.phases[:-1]), replace(schedule, phases=schedule.phases[-1:])
        stages = [("cross-entropy" if kind == "cross-entropy" else "forward-kl", first), (kind, last)]
    return [(name, replace(stage, seed=schedule.seed + 1 + i)) for i, (name, stage) in enumerate(stages)]


def continued(before: list[dict], rows: list[dict]) -> list[dict]:
    """``rows`` of a training that took over where ``before`` ended: what is counted goes on."""
    counts = {key: before[-1][key] if before else 0 for key in ("iteration", "tokens", "seconds")}
    return [row | {key: row[key] + count for key, count in counts.items()} for row in rows]


@torch.inference_mode()
def written(
    model: Transformer, tokens: np.ndarray, n: int, length: int, *, eot: int, seed: int, prompt_tokens: int = 16,
    batch_size: int = 128, temperature: float = 1.0,
) -> np.ndarray:  # fmt: skip
    """n texts of ``length`` tokens (n·length,) uint16 that ``model`` writes, each after a prompt from ``tokens``, each
    ended by ``eot``. The same seed, the same texts."""
    fast, sampling, n_ids = ready(model), Sampling(temperature), model.config.n_ids
    prompt_tokens = min(prompt_tokens, length - 1)
    generator, out = torch.Generator(fast.device).manual_seed(seed), []
    for begin in range(0, n, batch_size):
        rows = min(batch_size, n - begin)
        places = torch.randint(len(tokens) - prompt_tokens, (rows,), generator=generator, device=fast.device).tolist()
        text = torch.empty(rows, length, dtype=torch.long, device=fast.device)
        text[:, :prompt_tokens] = window(tokens, places, prompt_tokens)[0].to(fast.device)
        cache, unread = fast.new_cache(rows, length), text[:, :prompt_tokens]
        for i in range(prompt_tokens, length - 1):
            probs = sampling.probs(fast(unread, cache)[:, -1, :n_ids])  # (rows, V)
            unread = text[:, i : i + 1] = torch.multinomial(probs, 1, generator=generator)
        text[:, -1] = eot
        out.append(text.flatten().cpu().numpy().astype(np.uint16))
    return np.concatenate(out)


class OwnText(NamedTuple):
    """What a model is asked to write for a distillation."""

    tokens: int  # in all; as many at each temperature
    temperatures: tuple[float, ...]
    length: int  # of each text, its prompt included
    prompt_tokens: int
    seed: int


def _own_text(profile: Profile, model: Transformer, as_used: bool) -> OwnText:
    """As much as a distillation reads, or as the profile says at most: at temperature 1, or ``as_used`` in texts as long as
    the benchmark's, at its temperatures."""
    schedule, bench, n = profile.distillation, profile.bench, min(profile.own_text, profile.distillation.tokens)
    temperatures = bench.temperatures if as_used else (1.0,)
    length, prompt = (bench.prompt_tokens + bench.new_tokens, bench.prompt_tokens) if as_used else (schedule.block_size, 16)
    return OwnText(n, temperatures, min(length, model.config.context), prompt, schedule.seed)


def _written_once(model: Transformer, data: TokenData, profile: Profile, name: str, asked: OwnText) -> np.ndarray:
    """The text of ``model`` that is ``asked`` for, kept in a file that names what made it."""
    n, temperatures, length, prompt, seed = asked
    rows = 128 if model.device.type == "cpu" else 1024  # a GPU writes so many texts nearly as soon as one
    key = hashlib.sha256(f"{asked} {data.sha256} {_WRITERS}".encode())
    for weight in model.parameters():  # another training, another file
        key.update(weight.detach().cpu().numpy().tobytes())
    path = build_dir() / profile.name / "tokens" / f"{name}-{key.hexdigest()[:12]}.npy"
    if _text(path) is None and (not dist.is_initialized() or dist.get_rank() == 0):
        texts = np.concatenate([
            written(
                model, data.train, -(-n // (length * len(temperatures))), length, eot=data.eot, seed=seed + i,
                prompt_tokens=prompt, batch_size=rows, temperature=temperature,
            )
            for i, temperature in enumerate(temperatures)
        ])  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.partial")  # two processes may write the same text
        with open(unfinished, "wb") as file:
            np.save(file, texts)
        put_in_place(unfinished, path)
    if dist.is_initialized():
        dist.barrier()
    return _text(path)


def _text(path: Path) -> np.ndarray | None:
    """What is in the file; None if there is none, or not all of it."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        return None


@torch.inference_mode()
def acceptance(target: Transformer, draft: Transformer, data: TokenData, *, temperature: float = 1.0, n_windows: int = 32,
               block_size: int | None = None, offered: Tensor | None = None) -> Tensor:  # fmt: skip
    """α = Σ min(p, q) at every position of held-out windows → (n_windows, block_size); 0 or 1 at temperature 0.

    ``offered`` (N,) are the only ids that the draft offers; None: all.
    """
    block = block_size or min(target.config.context, draft.config.context)
    n_ids, rows, sampling = target.config.n_ids, [], Sampling(temperature)
    for start in held_out_starts(data, n_windows, block):
        ids, _ = window(data.validation, [start], block)
        p, q = (m(ids.to(m.device))[0, :, :n_ids].float() for m in (target, draft))
        q = q if offered is None else q[:, offered]
        q = sampling.probs(q, "draft model")
        q = q if offered is None else torch.zeros_like(p).index_copy_(1, offered, q)
        rows.append(overlap(sampling.probs(p, "target"), q))
    return torch.stack(rows)
