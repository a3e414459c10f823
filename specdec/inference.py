"""A trained model made ready for decoding: fixed weights, the fastest data type, matrices laid out for the machine.

What a model computes is not changed beyond its rounding. Passes of fixed shape can then be compiled, captured as a CUDA
graph, or made the same for every caller.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
import torch._inductor.config
from torch import Tensor, nn

from .model import KVCache, Rows, Transformer
from .train import can_compile, compiled, has_bf16

PASSES = ("eager", "compiled", "graphs")
EXACT_ROWS = 16  # an exact model computes every short pass as this many rows, so k is at most 15
SHORT = EXACT_ROWS + 1  # passes over more tokens are prefill, and run as they are


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


def ready(
    model: Transformer, dtype: str | torch.dtype = "auto", passes: str = "eager", exact: bool = False
) -> "Transformer | FixedShapes":
    """A copy of ``model`` for decoding, called like the model itself.

    ``dtype`` "auto" is bfloat16 where the machine multiplies it natively. ``passes`` says how short passes run:
    "eager"; "compiled" by torch.compile, after some seconds for each number of rows; as CUDA "graphs", which on a CPU
    is the same code without the capturing. ``exact``: a token's logits are the same bits however many tokens are read
    with it, so that greedy text does not depend on whether a draft helped; a pass costs what one over 16 rows costs.
    """
    if passes not in PASSES:
        raise ValueError(f"passes is {passes!r}; choose {', '.join(PASSES)}.")
    if passes == "compiled" and not can_compile(model.device):
        passes = "eager"
    if dtype == "auto":
        dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    model = plain = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    if can_pack(dtype, model.device):
        if passes == "compiled" and dtype == torch.bfloat16:
            plain = copy.deepcopy(model)  # the compiler lays these weights out itself, float32 ones not well
        pack(model)
    sizes = (EXACT_ROWS,) if exact else tuple(range(1, SHORT + 1))
    if passes == "graphs":
        return CapturedShapes(model, model.forward_at, sizes)
    if passes == "compiled":
        return CompiledShapes(model, plain, sizes)
    return FixedShapes(model, model.forward_at, sizes) if exact else model


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies this data type here, at a speed worth having."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16())


def pack(module: nn.Module) -> None:
    """Replace every Linear under ``module`` by its packed form."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, PackedLinear(child))
        else:
            pack(child)


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
    """Fixed shapes through torch.compile: one program for one row, one for any number of them. ``plain`` is the model
    that is compiled, its weights as constants ("freezing")."""

    def __init__(self, model: Transformer, plain: Transformer, sizes: tuple[int, ...]):
        super().__init__(model, plain.forward_at, sizes)
        self.programs: dict[bool, Callable] = {}

    def new_cache(self) -> KVCache:
        cache = super().new_cache()
        # a tensor for each layer: of one block the compiler would copy all whenever a row is written
        cache.k, cache.v = (tuple(layer.clone() for layer in block) for block in (cache.k, cache.v))
        return cache

    def read(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        several = ids.shape[1] > 1
        if several in self.programs:
            return self.programs[several](ids, positions, cache.k, cache.v)
        if several:
            torch._dynamo.mark_dynamic(ids, 1)
            torch._dynamo.mark_dynamic(positions, 0)
        self.programs[several] = self.program()
        with torch._inductor.config.patch(freezing=True):  # looked at when a program is made, and not later
            return self.programs[several](ids, positions, cache.k, cache.v)

    def program(self) -> Callable:
        """A function that torch.compile knows nothing of yet. It keeps its programs by code object, and looks through
        those of all models, weight by weight, before each call: half a millisecond that no call here needs."""

        def forward(ids: Tensor, positions: Tensor, keys: Rows, values: Rows) -> Tensor:
            return self.forward_at(ids, positions, keys, values)

        alone = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self.device.type == "cpu":
            options["cpp_wrapper"] = True
        return compiled(alone, self.device, options=options)


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
