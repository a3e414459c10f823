"""A trained model made ready for decoding: fixed weights, the fastest data type, matrices laid out for the machine.

What a model computes is not changed beyond its rounding. Passes of fixed shape can then be compiled, captured as a CUDA
graph, or made the same for every caller.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from .model import KVCache, ModelConfig, Transformer
from .programs import Program, program_path
from .sampling import Numbers, Randomness, Rule, Sampling, token_wise
from .train import can_compile, has_bf16

PASSES = ("eager", "compiled", "graphs")
EXACT_ROWS = 16  # an exact model computes every short pass as this many rows, so k is at most 15
SHORT = EXACT_ROWS + 1  # passes over more tokens are prefill, and run as they are
COMPILED = (1, 2, 3, 4, 5, 9)  # rows of the compiled programs, half a minute of compiling each; k is best at most 8
CUT = 64  # rows of the cache that a compiled pass reads more as the text grows


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


class StreamedLinear(nn.Module):
    """A Linear for the compiler and few rows: each weight is loaded once and multiplied with every row while it is there.

    Decoding is as fast as memory delivers the weights. Library products of so few rows reach a third of that speed on
    some machines; these sums come closer to it, for several rows too.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)  # (N, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = stored(x.reshape(-1, x.shape[-1]))  # (B·T, C)
        products = [(self.weight * row).sum(-1) for row in rows.unbind(0)]  # the compiler makes one loop of them
        return torch.stack(products).view(*x.shape[:-1], -1)


def streamed_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """Attention of few queries (B, K, R, D) in plain sums that the compiler fuses with what is around them: a call of the
    library's takes longer than its work."""
    q = stored(q.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5)
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1)  # (B, K, R, S)
    probs = stored(scores.masked_fill(~attn_mask, -torch.inf).softmax(-1))
    return (probs[..., None] * v[:, :, None]).sum(-2).to(v.dtype)  # (B, K, R, D)


def stored(x: Tensor) -> Tensor:
    """``x``, kept in memory: the compiler would otherwise compute it again for each of the sums that read it."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def ready(
    model: Transformer, dtype: str | torch.dtype = "auto", passes: str = "eager", exact: bool = False
) -> "Transformer | FixedShapes":
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
        pack(model)
    if short is not None:
        return CompiledShapes(model, stream(short))
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


def pack(module: nn.Module, kind: type[nn.Module] = PackedLinear) -> None:
    """Replace every Linear under ``module`` by its packed form, or by that ``kind`` of it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, kind(child))
        else:
            pack(child, kind)


def stream(model: Transformer) -> Transformer:
    """``model`` written in sums, for the compiler."""
    pack(model, StreamedLinear)
    for block in model.blocks:
        block.attention.attend = streamed_attention
    return model


def trimmed(model: Transformer, ids: Tensor) -> Transformer:
    """A copy of a draft whose output layer offers only ``ids`` (N,): its logits are (…, N), in that order.

    Lossless like any draft, since q is zero elsewhere; what it costs is acceptance (FR-Spec, Zhao et al. 2025).
    """
    model = copy.deepcopy(model)
    head = nn.Linear(model.config.width, len(ids), bias=False, device="meta")
    head.weight = nn.Parameter(model.head.weight.detach()[ids])
    model.head = head
    return model


class FixedShapes:
    """A model whose short passes come in few shapes. A pass over T tokens runs as the smallest of ``sizes`` rows that
    holds them, its last token repeated: that writes the same row of the cache again and changes nothing."""

    def __init__(self, model: Transformer, forward_at: Callable, sizes: tuple[int, ...]):
        self.model, self.forward_at, self.sizes = model, forward_at, sizes
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.positions = torch.arange(model.config.context, device=model.device)

    def new_cache(self) -> KVCache:
        return self.model.new_cache()

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, T, V), as of the model itself."""
        T = ids.shape[1]
        size = next((n for n in self.sizes if n >= T), None)
        if size is None:
            if cache.length and self.sizes == (EXACT_ROWS,):
                raise ValueError(f"an exact pass reads at most {EXACT_ROWS} tokens; choose k ≤ {EXACT_ROWS - 1}.")
            return self.model(ids, cache)
        start = cache.append(T)
        positions = self.positions[start : cache.length]
        if size > T:
            rows = self.positions[:size].clamp(max=T - 1)
            ids, positions = ids[:, rows], positions[rows]
        return self.read(ids, positions, cache)[:, :T]

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return self.forward_at(ids, positions, cache.k, cache.v)


class CompiledShapes(FixedShapes):
    """Short passes as compiled programs, one for each of a few numbers of rows. ``short`` is the model that is compiled,
    ``model`` the same one as it reads a prompt. Of the cache a pass reads what the text fills, in whole steps of
    ``CUT`` rows."""

    def __init__(self, model: Transformer, short: Transformer, sizes: tuple[int, ...] = COMPILED):
        super().__init__(model, short.forward_at, sizes)
        self.short, self.programs = short, {}

    def new_cache(self) -> "CutCache":
        return CutCache(self.config, self.dtype)

    def read(self, ids: Tensor, positions: Tensor, cache: "CutCache") -> Tensor:
        rows = ids.shape[1]
        if rows not in self.programs:
            self.programs[rows] = self.program(rows)
        return self.programs[rows](ids, positions, *cache.layers())[0]

    def program(self, rows: int) -> Program:
        def inputs():
            layers = CutCache(self.config, self.dtype).layers(min(CUT, self.config.context))
            return torch.zeros(1, rows, dtype=torch.long), torch.arange(rows), layers

        filled = torch.export.Dim("filled", min=2, max=self.config.context)
        shapes = None, None, [{2: filled}] * (2 * self.config.n_layers)
        return Program(*self.key(rows), ShortPass(self.short), inputs, shapes)

    def key(self, rows: int) -> tuple[str, tuple]:
        """Name of the program, and all that it depends on but the code: sizes, type, and the ids that are offered."""
        return f"pass-of-{rows}", (rows, self.config, self.dtype, self.short.head.weight.shape[0])


def compile_ahead(models: dict[Transformer | FixedShapes, tuple[int, ...]]) -> None:
    """Compile the passes of so many rows of models made ready, two at a time, as far as they are not on disk yet. It
    would happen without this, one after another: a compiler keeps one core busy."""
    passes = [(m, rows) for m, sizes in models.items() if isinstance(m, CompiledShapes) for rows in sizes]
    missing = {name + repr(parts): parts for name, parts in (m.key(rows) for m, rows in passes)
               if not program_path(name, parts).exists()}  # fmt: skip
    if len(missing) > 1:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            list(pool.map(partial(_compile_pass, torch.get_num_threads()), *zip(*missing.values())))


def _compile_pass(threads: int, rows: int, config: ModelConfig, dtype: torch.dtype, n_offered: int) -> None:
    torch.set_num_threads(threads)  # a program is made for so many
    model = Transformer(config)  # whatever its weights are
    if n_offered != config.vocab_size:
        model = trimmed(model, torch.arange(n_offered))
    ready(model, dtype, "compiled").program(rows)


class ShortPass(nn.Module):
    """`Transformer.forward_at` as torch.export wants it: ``layers`` are keys of all layers, then values."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, layers: list[Tensor]) -> Tensor:
        n = len(layers) // 2
        return self.model.forward_at(ids, positions, layers[:n], layers[n:])


class CutCache(KVCache):
    """A cache that hands out its rows layer by layer, cut after the text."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        # a row that is never used: with it no cut is the whole block, which a program would have to treat differently
        super().__init__(config, capacity=config.context + 1, dtype=dtype)
        self.capacity = config.context
        self.cuts: dict[int, list[Tensor]] = {}

    def layers(self, rows: int | None = None) -> list[Tensor]:
        """The first ``rows`` rows of each layer's keys, then values (B, K, rows, D); None: what the text fills."""
        rows = rows or min(-(-self.length // CUT) * CUT, self.capacity)
        if rows not in self.cuts:
            self.cuts[rows] = [layer[:, :, :rows] for block in (self.k, self.v) for layer in block]
        return self.cuts[rows]


@dataclass(frozen=True)
class CompiledSampling(Sampling):
    """`Sampling` as programs. Between two passes, which sweep the caches of the processor, each small step of the
    library's costs several times what it does alone. Like an accelerator, a program does not look for NaN."""

    def probs(self, logits: Tensor, model: str = "model") -> Tensor:
        if logits.dim() != 2 or len(logits) < 2:
            return super().probs(logits, model)
        return _rows_program(self, *_kind(logits))(logits.contiguous())[0]

    def draw(self, logits: Tensor, randomness: Randomness, model: str = "model") -> tuple[Tensor, Tensor]:
        return tuple(_draw_program(self, *_kind(logits))(logits.contiguous(), randomness.uniforms(1)))


def _kind(logits: Tensor) -> tuple[int, torch.dtype]:
    return logits.shape[-1], logits.dtype


@cache
def _rows_program(sampling: Sampling, n_ids: int, dtype: torch.dtype) -> Program:
    def inputs():
        return (torch.zeros(5, n_ids, dtype=dtype),)

    rows = {0: torch.export.Dim("rows", min=2, max=1024)}
    return Program("probs", (sampling, n_ids, dtype), Function(sampling.probs_or_nan), inputs, ((rows,),), threads=1)


@cache
def _draw_program(sampling: Sampling, n_ids: int, dtype: torch.dtype) -> Program:
    def inputs():
        return torch.zeros(n_ids, dtype=dtype), torch.zeros(1, dtype=torch.float64)

    def draw(logits, numbers):
        probs = sampling.probs_or_nan(logits)
        return Numbers(numbers).choose(probs), probs

    return Program("draw", (sampling, n_ids, dtype), Function(draw), inputs, threads=1)


class CompiledRule:
    """A rule as one program for any k ≥ 2."""

    def __init__(self, rule: Rule):
        self.rule = rule

    def __call__(self, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness):
        k, n_ids = draft_probs.shape
        if k < 2:
            return self.rule(drafted, draft_probs, target_probs, randomness)
        program = _rule_program(self.rule, n_ids, draft_probs.dtype, target_probs.dtype)
        numbers = randomness.uniforms(k + 1)
        return tuple(program(drafted, draft_probs.contiguous(), target_probs.contiguous(), numbers))


@cache
def _rule_program(rule: Rule, n_ids: int, draft_dtype: torch.dtype, target_dtype: torch.dtype) -> Program:
    def inputs():
        p = torch.ones(5, n_ids) / n_ids
        return torch.zeros(4, dtype=torch.long), p[:4].to(draft_dtype), p.to(target_dtype), torch.zeros(5).double()

    def decide(drafted, draft_probs, target_probs, numbers):
        return rule(drafted, draft_probs, target_probs, Numbers(numbers))

    k = torch.export.Dim("k", min=2, max=1024)
    shapes = (({0: k}, {0: k}, {0: k + 1}, {0: k + 1}),)
    parts = rule.__name__, n_ids, draft_dtype, target_dtype
    return Program(rule.__name__, parts, Function(decide), inputs, shapes, threads=1)


class Function(nn.Module):
    """A function as torch.export wants it."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


class CapturedShapes(FixedShapes):
    """Fixed shapes as CUDA graphs, captured when first needed. A graph knows its cache by address: there is one cache,
    and one text at a time."""

    def __init__(self, model: Transformer, forward_at: Callable, sizes: tuple[int, ...]):
        super().__init__(model, forward_at, sizes)
        self.cache, self.graphs = model.new_cache(), {}

    def new_cache(self) -> KVCache:
        self.cache = copy.copy(self.cache)  # the same rows under a new length: who holds the old one is told so
        self.cache.truncate(0)
        return self.cache

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        if cache is not self.cache:
            raise ValueError("another text was begun on this model; captured passes decode one text at a time.")
        rows = ids.shape[1]
        if rows not in self.graphs:
            function = partial(self.forward_at, keys=cache.k, values=cache.v)
            self.graphs[rows] = Captured(function, ids, positions)
        return self.graphs[rows](ids, positions)


class Captured:
    """A function of tensors whose shapes never change, replayed as one CUDA graph; on a CPU simply called.

    It is captured on ``inputs`` and run a few times for that, so calling it twice must do no harm. What it returns
    is overwritten by the next call.
    """

    def __init__(self, function: Callable, *inputs: Tensor):
        self.function, self.inputs, self.graph = function, [x.clone() for x in inputs], None
        if inputs[0].device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate their workspaces before anything is captured
                for _ in range(3):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return self.outputs
