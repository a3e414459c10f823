"""A trained model made ready for decoding: fixed weights, the fastest data type, matrices laid out for the machine.

What a model computes is not changed beyond its rounding. Passes of fixed shape can then be compiled, captured as a CUDA
graph, or made the same for every caller.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from .compiled import COMPILED, PROMPT, CompiledRule, CompiledSampling, CompiledShapes, Work, replace_linears, stream
from .model import KVCache, ModelConfig, Transformer
from .passes import EXACT_ROWS, SHORT, CapturedShapes, FixedShapes
from .products import DTYPES, MOST, PanelLinear
from .programs import program_path
from .sampling import Randomness, Rule, Sampling, token_wise
from .train import can_compile, has_bf16

PASSES = ("eager", "compiled", "graphs")
Model = Transformer | FixedShapes


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


def ready(model: Transformer, dtype: str | torch.dtype = "auto", passes: str = "eager", exact: bool = False) -> Model:
    """A copy of ``model`` for decoding, called like the model itself.

    ``dtype`` "auto" is bfloat16 where the machine multiplies it natively. ``passes`` says how short passes run:
    "eager"; "compiled" for the CPU, which takes minutes once and is kept on disk; as CUDA "graphs", which on a CPU is
    the same code without the capturing. ``exact``: a token's logits are the same bits however many tokens are
    read with it, so that greedy text does not depend on whether a draft helped; a pass costs what one over 16 rows
    costs, and is not compiled.
    """
    if passes not in PASSES:
        raise ValueError(f"passes is {passes!r}; choose {', '.join(PASSES)}.")
    if passes == "compiled" and model.device.type != "cpu":
        raise ValueError("compiled passes are for the CPU; choose graphs on a GPU.")
    if passes == "compiled" and not can_compile():
        passes = "eager"
    if dtype == "auto":
        dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    short = copy.deepcopy(model) if passes == "compiled" and not exact else None  # what short passes are compiled from
    if can_pack(dtype, model.device):
        few = dtype == torch.float32 and short is None and can_compile()
        replace_linears(model, SplitLinear if few else PackedLinear)
    if short is not None:
        # the sums that other types are left with take long to compile for a prompt
        return CompiledShapes(model, stream(short), (*COMPILED, PROMPT) if dtype in DTYPES else COMPILED)
    sizes = (EXACT_ROWS,) if exact else tuple(range(1, SHORT + 1))
    if passes == "graphs":
        return CapturedShapes(model, model.forward_at, sizes)
    return FixedShapes(model, model.forward_at, sizes) if exact else model


@cache
def ready_rule(rule: Rule, passes: str = "eager") -> Rule:
    """The same ``rule``, for the same tokens of the same random numbers, as quick as ``passes`` says. A rule that goes
    through its drafts one by one, like the block rule, is left as it is."""
    return CompiledRule(rule) if passes == "compiled" and rule is token_wise and can_compile() else rule


@cache
def ready_sampling(sampling: Sampling, passes: str = "eager") -> Sampling:
    """The same ``sampling`` as quick as ``passes`` says."""
    return CompiledSampling(**asdict(sampling)) if passes == "compiled" and can_compile() else sampling


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies this data type here, at a speed worth having."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16())


def trimmed(model: Transformer, ids: Tensor) -> Transformer:
    """A copy of a draft whose output layer offers only ``ids`` (N,): its logits are (…, N), in that order.

    Lossless like any draft, since q is zero elsewhere; what it costs is acceptance (FR-Spec, Zhao et al. 2025).
    """
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.n_ids:
        raise ValueError(f"the draft is to offer an id outside 0 … {model.config.n_ids - 1}; give ids of the tokenizer.")
    model = copy.deepcopy(model)
    head = nn.Linear(model.config.width, len(ids), bias=False, device="meta")
    head.weight = nn.Parameter(model.head.weight.detach()[ids])
    model.head = head
    model.offered = ids.clone()
    return model


def draw_next(
    model: Model, ids: Tensor, cache: KVCache, sampling: Sampling, randomness: Randomness, name: str = "model"
) -> tuple[Tensor, Tensor]:
    """The token (1,) that follows ids (1, T), which continue the text in ``cache``, and the row it was drawn from: (1, V),
    or (1, N) of a model with a trimmed output layer. ``name`` is whom to blame for a logit that is not finite."""
    if isinstance(model, CompiledShapes) and isinstance(randomness, Randomness):  # a test's oracle chooses by itself
        return model.draw(ids, cache, sampling, randomness)
    token, probs = sampling.draw(model(ids, cache)[0, -1, : model.config.n_ids], randomness, name)
    return token, probs[None]


def compile_ahead(models: dict[Model, Sequence[Work]], others: dict[Path, Callable] | None = None) -> None:
    """Compile the programs of models made ready, and ``others``, two at a time, as far as they are not on disk yet. It
    would happen without this, one after another: a compiler keeps one core busy."""
    keys = [m.key(w) for m, work in models.items() if isinstance(m, CompiledShapes) for w in work if m.runs(w)]
    jobs = {program_path(*key): partial(_compile, *key[1]) for key in keys} | (others or {})
    missing = [job for path, job in jobs.items() if not path.exists()]
    if len(missing) > 1:
        # a program is made for as many threads as this process has
        with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            for running in [pool.submit(_run, job) for job in missing]:
                running.result()


def _run(job: Callable) -> None:
    job()  # what it returns cannot be sent to another process, and need not be


def _compile(work: Work, config: ModelConfig, dtype: torch.dtype, n_offered: int) -> None:
    model = Transformer(config)  # whatever its weights are
    if n_offered != config.vocab_size:
        model = trimmed(model, torch.arange(n_offered))
    ready(model, dtype, "compiled").program(work)
