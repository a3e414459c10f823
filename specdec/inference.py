"""A trained model made ready for decoding: fixed weights, the fastest data type, matrices laid out for the machine.

What a model computes is not changed beyond its rounding. Passes of fixed shape can then be compiled, captured as a CUDA
graph, or made the same for every caller.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import KVCache, Rows, Transformer
from .train import can_compile, compiled, has_bf16

PASSES = ("eager", "compiled", "graphs")
EXACT_ROWS = 16  # an exact model computes every short pass as this many rows, so k is at most 15
SHORT = EXACT_ROWS + 1  # passes over more tokens are prefill, and run as they are
COMPILED = (1, 2, 3, 5, 9)  # rows of the compiled programs, some ten seconds of compiling each; k is best at most 8
FEW_QUERIES = 8  # up to so many, attention is compiled with the rest
ONE_CORE = 8 << 20  # bytes of weights that one core has read before a second one is awake


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
    some machines; these sums come close to it, and one row or five take nearly the same time.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)  # (N, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = stored(x.reshape(-1, x.shape[-1]))  # (B·T, C)
        products = [(self.weight * row).sum(-1) for row in rows.unbind(0)]  # the compiler makes one loop of them
        return torch.stack(products).view(*x.shape[:-1], -1)


def streamed_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """Attention of few queries (B, K, R, D), as one token has them, in plain sums that the compiler fuses with what is
    around them. A call of the library's takes longer than its work; it is worth it for more queries."""
    if q.shape[2] > FEW_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
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
    "eager"; "compiled" by torch.compile, after some ten seconds for each number of rows; as CUDA "graphs", which on a
    CPU is the same code without the capturing. ``exact``: a token's logits are the same bits however many tokens are
    read with it, so that greedy text does not depend on whether a draft helped; a pass costs what one over 16 rows
    costs, and is not compiled.
    """
    if passes not in PASSES:
        raise ValueError(f"passes is {passes!r}; choose {', '.join(PASSES)}.")
    if passes == "compiled" and not can_compile(model.device):
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
        return CompiledShapes(model, stream(short) if short.device.type == "cpu" else short)
    sizes = (EXACT_ROWS,) if exact else tuple(range(1, SHORT + 1))
    if passes == "graphs":
        return CapturedShapes(model, model.forward_at, sizes)
    return FixedShapes(model, model.forward_at, sizes) if exact else model


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
    """Short passes through torch.compile, one program for each of a few numbers of rows. ``short`` is the model that is
    compiled, ``model`` the same one as it reads a prompt."""

    def __init__(self, model: Transformer, short: Transformer, sizes: tuple[int, ...] = COMPILED):
        super().__init__(model, short.forward_at, sizes)
        self.programs: dict[int, Callable] = {}
        self.options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self.device.type == "cpu":
            self.options["cpp_wrapper"] = True
            if short.n_params(read_per_token=True) * self.dtype.itemsize <= ONE_CORE:
                self.options["cpp.threads"] = 1

    def new_cache(self) -> KVCache:
        cache = super().new_cache()
        # a tensor for each layer: of one block the compiler would copy all whenever a row is written
        cache.k, cache.v = (tuple(layer.clone() for layer in block) for block in (cache.k, cache.v))
        return cache

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        rows = ids.shape[1]
        if rows not in self.programs:
            self.programs[rows] = self.program()
        return self.programs[rows](ids, positions, cache.k, cache.v)

    def program(self) -> Callable:
        """A function that torch.compile knows nothing of yet. It keeps its programs by code object, and looks through
        those of all models, weight by weight, before each call: half a millisecond that no call here needs."""

        def forward(ids: Tensor, positions: Tensor, keys: Rows, values: Rows) -> Tensor:
            return self.forward_at(ids, positions, keys, values)

        alone = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
        return compiled(alone, self.device, dynamic=False, options=self.options)


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
