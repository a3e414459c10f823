"""Distillation: the draft learns the target's distribution instead of the text, because that is what alpha measures.

α = 1 − TV(p, q), so total variation and −log α train the metric itself, but their gradients vanish where q is far from
p; forward KL does not (DistillSpec, Zhou et al. 2023, 2310.08461; LK losses, 2602.23881). Every comparison is
against a control: the same start, steps and batches with plain cross-entropy, since otherwise a gain may only be
more training.
"""

import copy
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .data import TokenData, tokens_for, window
from .model import Transformer
from .profiles import Profile
from .theory import overlap
from .train import History, Loss, cross_entropy, has_bf16, held_out_starts, load_or_train, source_key, trained

_SOURCES = source_key("distill")
DIVERGENCES = ("forward-kl", "total-variation", "neg-log-alpha")


def distillation_loss(teacher: Transformer, kind: str) -> Loss:
    """loss(model, ids, targets): how far the student's q is from the teacher's p at every position, in nats.

    The targets are not looked at. The teacher runs in bf16 where the machine has it, without gradients; padding ids are
    left out of both distributions.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"there is no divergence {kind!r}; choose one of {', '.join(DIVERGENCES)}.")
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    if has_bf16(teacher.device):
        teacher = teacher.bfloat16()
    n_ids = teacher.config.n_ids

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            p = teacher(ids)[..., :n_ids].float().log_softmax(-1)  # (B, T, V)
        q = model(ids)[..., :n_ids].float().log_softmax(-1)
        if kind == "forward-kl":
            return (p.exp() * (p - q)).sum(-1).mean()
        if kind == "total-variation":
            return 0.5 * (p.exp() - q.exp()).abs().sum(-1).mean()
        return -torch.minimum(p.exp(), q.exp()).sum(-1).log().mean()

    return loss


def load_or_distill(
    profile: Profile, kind: str = "forward-kl", *, role: str = "small", device: str | torch.device = "cpu"
) -> tuple[Transformer, History]:
    """The draft of that role, trained further on the target by ``kind``; "cross-entropy" is the control."""
    if kind not in ("cross-entropy", *DIVERGENCES):
        raise ValueError(f"there is no divergence {kind!r}; choose one of {', '.join(DIVERGENCES)} or cross-entropy.")
    schedule, data = profile.distillation, tokens_for(profile)
    target, _ = load_or_train(profile, "target", device=device)
    start, _ = load_or_train(profile, role, device=device)
    parts = {
        "kind": kind,
        "models": [asdict(profile.models["target"]), asdict(profile.models[role])],
        "schedules": [asdict(profile.schedules["target"]), asdict(profile.schedules[role]), asdict(schedule)],
        "data": data.sha256,
        "distill": _SOURCES,
    }
    loss = cross_entropy if kind == "cross-entropy" else distillation_loss(target, kind)
    return trained(profile, f"{role}-{kind}", parts, lambda: start, data, schedule, loss, device)


@torch.inference_mode()
def acceptance(target: Transformer, draft: Transformer, data: TokenData, *, temperature: float = 1.0,
               n_windows: int = 32, block_size: int | None = None) -> Tensor:  # fmt: skip
    """α = Σ min(p, q) at every position of held-out windows → (n_windows, block_size)."""
    block = block_size or min(target.config.context, draft.config.context)
    n_ids, rows = target.config.n_ids, []
    for start in held_out_starts(data, n_windows, block):
        ids, _ = window(data.validation, [start], block)
        p, q = (m(ids.to(m.device))[0, :, :n_ids].float() for m in (target, draft))
        if temperature == 0:
            rows.append((p.argmax(-1) == q.argmax(-1)).float())
        else:
            rows.append(overlap((p / temperature).softmax(-1), (q / temperature).softmax(-1)))
    return torch.stack(rows)
