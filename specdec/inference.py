"""A trained model made ready for decoding: fixed weights, the fastest data type, matrices laid out for the machine.

What a model computes is not changed beyond its rounding. Passes of fixed shape can then be compiled, captured as a CUDA
graph, or made the same for every caller.
"""

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from .compiled import CompiledModel, compiled_rule
from .cuda import CudaModel, cuda_rule
from .model import KVCache, Transformer
from .native import MOST, PanelLinear, Whole, has_library
from .passes import EXACT_ROWS, SHORT, CapturedShapes, FixedShapes
from .sampling import Randomness, Rule, Sampling, as_written, block, token_wise
from .train import has_bf16

PASSES = ("eager", "compiled", "graphs")
DTYPES = ("float32", "bfloat16", "float16", "float64")
Model = Transformer | FixedShapes | Whole


class PackedLinear(nn.Module):
    """A Linear whose weight oneDNN has reordered once.

    In bfloat16 a plain weight is reordered again for every product, which then takes about twice as long. In float32 a
    product of 2 to 9 rows takes about twice as long as one of a single row, unless the weight was laid out for several.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows = 1 if linear.weight.dtype == torch.bfloat16 else 5
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class SplitLinear(PackedLinear):
    """A float32 Linear that multiplies few rows as fast as memory delivers the weights, and a prompt as oneDNN does."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.few = PanelLinear(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(x) if x.numel() <= MOST * self.in_features else super().forward(x)


def replace_linears(module: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``kind`` of it in the place of every Linear under ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, kind(child))
        else:
            replace_linears(child, kind)


def ready(model: Transformer, dtype: str | torch.dtype = "auto", passes: str = "eager", exact: bool = False) -> Model:
    """A copy of ``model`` for decoding, called like the model itself, with ids (1, T) of one text: batch 1, unless it is
    eager and not ``exact``.

    ``dtype`` "auto" is bfloat16 where the machine multiplies it natively. ``passes`` says how short passes run:
    "eager"; "compiled", in C++ or as CUDA kernels; as CUDA "graphs", which on a CPU is the same code without the capturing.
    ``exact``: a token's logits are the same bits however many tokens are read with it, so that greedy text does not
    depend on whether a draft helped. Compiled passes are so by themselves; of any other a short one then costs what
    one over 16 rows costs.
    """
    if passes not in PASSES:
        raise ValueError(f"passes is {passes!r}; choose {', '.join(PASSES)}.")
    if not isinstance(model, Transformer) or isinstance(model.head, PackedLinear):
        raise ValueError("the model was made ready before; give the one that it was made from.")
    if passes == "compiled" and model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"compiled passes are for CPUs and CUDA, not for {model.device.type}; choose eager.")
    if dtype == "auto":
        dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    elif (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose auto, {', '.join(DTYPES)}.")
    else:
        dtype = getattr(torch, name)
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    if passes == "compiled" and can_be_compiled(model.device):
        return CudaModel(model) if model.device.type == "cuda" else CompiledModel(model)
    if can_pack(dtype, model.device):
        replace_linears(model, SplitLinear if dtype == torch.float32 and has_library() else PackedLinear)
    sizes = (EXACT_ROWS,) if exact else tuple(range(1, SHORT + 1))
    if passes == "graphs":
        return CapturedShapes(model, model.forward_at, sizes)
    return FixedShapes(model, model.forward_at, sizes) if exact else model


@cache
def ready_rule(rule: Rule, passes: str = "eager", device: str | torch.device = "cpu") -> Rule:
    """The same ``rule``, for the same tokens of the same random numbers, as quick as ``passes`` says. Only `token_wise`
    and `block` have a faster form."""
    if passes != "compiled" or rule not in (token_wise, block) or not can_be_compiled(device):
        return rule
    return partial(cuda_rule if torch.device(device).type == "cuda" else compiled_rule, rule)


def can_be_compiled(device: str | torch.device) -> bool:
    """Whether there are compiled passes here."""
    return torch.device(device).type == "cuda" or has_library()


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies this data type here, at a speed worth having."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16())


def trimmed(model: Transformer, ids: Tensor) -> Transformer:
    """A copy of a draft whose output layer offers only ``ids`` (N,): its logits are (…, N), in that order.

    Lossless like any draft, since q is zero elsewhere; what it costs is acceptance (FR-Spec, Zhao et al. 2025).
    ValueError for ids that are none, repeated or unknown, and for a model that was trimmed before.
    """
    if model.offered is not None:
        raise ValueError("the draft's output layer was trimmed before; give the draft with all of it.")
    if not len(ids) or len(ids.unique()) < len(ids):
        raise ValueError("the draft is to offer no id at all, or one of them twice; give at least one, each once.")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.n_ids:
        raise ValueError(f"the draft is to offer an id outside 0 … {model.config.n_ids - 1}; give ids of the tokenizer.")
    model, ids = copy.deepcopy(model), ids.long()
    head = nn.Linear(model.config.width, len(ids), bias=False, device="meta")
    head.weight = nn.Parameter(model.head.weight.detach()[ids])
    model.head = head
    model.offered = ids.clone()
    return model


@torch.inference_mode()
def read(model: Model, ids: Tensor, cache: KVCache) -> None:
    """Add ids (1, T) to the text in ``cache``; nobody wants their logits."""
    (model.read if isinstance(model, Whole) else model)(ids, cache)


def draw_next(
    model: Model, ids: Tensor, cache: KVCache, sampling: Sampling, randomness: Randomness, name: str = "model"
) -> tuple[Tensor, Tensor]:
    """The token (1,) that follows ids (1, T), which continue the text in ``cache``, and the row it was drawn from: (1, V),
    or (1, N) of a model with a trimmed output layer. ``name`` is whom to blame for a logit that is not finite."""
    if isinstance(model, Whole) and as_written(randomness):  # a test's oracle chooses by itself
        return model.draw(ids, cache, sampling, randomness)
    with torch.inference_mode():
        token, probs = sampling.draw(model(ids, cache)[0, -1, : model.config.n_ids], randomness, name)
        return token, probs[None]


def next_probs(model: Model, ids: Tensor, cache: KVCache, sampling: Sampling, name: str = "model") -> Tensor:
    """The rows (T, V) that follow each of ids (1, T), which continue the text in ``cache``: what a verifying pass is for."""
    if isinstance(model, Whole):
        return model.probs(ids, cache, sampling)
    with torch.inference_mode():
        return sampling.probs(model(ids, cache)[0, :, : model.config.n_ids], name)
