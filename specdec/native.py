"""The one place where the report leaves Python: short passes and what goes with them, in C++ (native.cpp), compiled once
for a machine."""

import ctypes
import hashlib
import os
import shutil
import tempfile
import warnings
from ctypes import POINTER, Structure, c_bool, c_double, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import put_in_place
from .data import build_dir
from .model import KVCache, Transformer
from .sampling import Randomness, Sampling, spread
from .train import can_compile, compiler

MOST = 32  # as in native.cpp: most rows of a pass
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # bfloat16: of the weights; sums are float32
SUMS = (torch.float32, torch.float64)
# of GCC; the second: a single chain of sums is to be fused like several, so that a row has the same bits in any company
FLAGS = ("-ftree-loop-vectorize", "--param=avoid-fma-max-bits=0", "-Wno-psabi")
_SOURCE = Path(__file__).with_suffix(".cpp")


def sums(dtype: torch.dtype) -> torch.dtype:
    """What numbers are computed in where weights are of ``dtype``: float64, or else float32."""
    return torch.promote_types(dtype, torch.float32)


def library_path() -> Path:
    """Where it is kept: another machine, torch or source has another one."""
    processor = torch.backends.cpu.get_cpu_capability(), torch.cpu._is_avx512_bf16_supported()
    machine = torch.__version__, processor, compiler(), FLAGS, _SOURCE.read_text()
    return build_dir() / "native" / f"native-{hashlib.sha256(repr(machine).encode()).hexdigest()[:12]}.so"


def build(path: Path) -> None:
    """Compile into ``path``, which is there completely or not at all, with the options of torch's own compiler."""
    from torch._inductor import config  # not above: it takes seconds to import
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, is_gcc

    path.parent.mkdir(parents=True, exist_ok=True)
    # multiply and add in one instruction; but add in the order written, whatever torch is told to do elsewhere
    contract = {"cpp.enable_floating_point_contract_flag": "fast", "cpp.enable_unsafe_math_opt_flag": False}
    own = {"cpp.cxx": (None, compiler())}
    # not in the project's own folders, whose names may have spaces
    with tempfile.TemporaryDirectory() as folder, config.patch(contract | own):
        source = shutil.copy(_SOURCE, folder)
        builder = CppBuilder("native", source, CppTorchOptions(extra_flags=FLAGS if is_gcc() else ()), folder)
        builder.build()
        partial = shutil.copy(builder.get_target_file_path(), path.with_suffix(f".{os.getpid()}"))
        put_in_place(partial, path)


@cache
def library() -> ctypes.CDLL:
    """The functions of native.cpp."""
    path = library_path()
    if not path.exists():
        build(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # a damaged file, which is made again
        build(path)
        loaded = ctypes.CDLL(str(path))
    n, at, model = c_long, c_void_p, POINTER(_Model)
    functions = {
        "multiply": (None, at, n, n, at, n, at),
        "read": (c_bool, model, at, at, at, n, n, n, at),
        "probabilities": (c_bool, model, at, at, at, n, n, c_double, at),
        "draw": (c_bool, model, at, at, at, n, n, n, c_double, at, c_bool, at, at),
        "decide": (c_bool, c_bool, at, at, n, at, n, at, n, n, at, at),
    }
    for name, (result, *arguments) in functions.items():
        function = getattr(loaded, f"specdec_{name}")
        function.restype, function.argtypes = result, (c_int, *arguments)
        setattr(loaded, name, function)
    loaded.pairs, loaded.lanes = bool(loaded.specdec_pairs()), loaded.specdec_lanes()
    return loaded


@cache
def has_library() -> bool:
    """Whether there is `library`, compiled if need be. A compiler that fails at it is warned of, once."""
    if not can_compile():
        return False
    try:
        library()
    except (OSError, RuntimeError) as error:
        reason = f"{compiler()}: {type(error).__name__}"
        warnings.warn(f"native.cpp cannot be compiled ({reason}), so decoding is slower; set CXX to GCC 12 or newer.", stacklevel=2)
        return False
    return True


def multiplied(dtype: torch.dtype) -> torch.dtype:
    """What numbers are rounded to before they are multiplied by weights of ``dtype``."""
    return dtype if dtype == torch.bfloat16 and library().pairs else sums(dtype)


def panels(weight: Tensor) -> Tensor:
    """A matrix (N, C) as panels (N/L, C, L) of L outputs that lie together and are multiplied at once, one in each lane of a
    register; where numbers are multiplied in pairs, (N/L, C/2, L, 2)."""
    lanes = library().lanes
    rows = F.pad(weight.detach(), (0, 0, 0, -len(weight) % lanes)).view(-1, lanes, weight.shape[1])
    if weight.dtype == torch.bfloat16 and library().pairs:
        rows = F.pad(rows, (0, rows.shape[2] % 2)).unflatten(2, (-1, 2))
    return rows.transpose(1, 2).contiguous()


class PanelLinear(nn.Module):
    """A Linear for up to 32 rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.weight.dtype not in TYPES:
            raise ValueError(f"there are no panels of {linear.weight.dtype}; choose float32, float64 or bfloat16.")
        (self.n_outputs, self.n_inputs), dtype = linear.weight.shape, linear.weight.dtype
        self.type, self.sums = TYPES[dtype], sums(dtype)
        self.panels = nn.Parameter(panels(linear.weight), requires_grad=False)
        self.multiply = library().multiply

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.sums).contiguous()
        if len(rows) > MOST:
            raise ValueError(f"{len(rows)} rows are too many for panels; give at most {MOST}.")
        if rows.shape[1] != self.n_inputs:
            raise ValueError(f"rows of {rows.shape[1]} numbers were given where {self.n_inputs} are multiplied.")
        y = rows.new_empty(len(rows), len(self.panels) * self.panels.shape[2])
        self.multiply(self.type, rows.data_ptr(), *rows.shape, self.panels.data_ptr(), len(self.panels), y.data_ptr())
        return y[:, : self.n_outputs].view(*x.shape[:-1], -1).to(x.dtype)


class Whole:
    """A model whose passes, and drafts of several tokens, are one call each: what those of a CPU and of a GPU share."""

    n_choices: int  # ids that it offers
    offered: Tensor | None  # which those are, if they are not all

    def probs(self, ids: Tensor, cache: KVCache, sampling: Sampling) -> Tensor:
        """The rows (T, V) that follow each of ids (1, T), as far as they are read; a row that is not finite is NaN."""
        return sampling.probs_or_nan(self(ids, cache)[0, :, : self.n_choices])

    def draw(self, ids: Tensor, cache: KVCache, sampling: Sampling, randomness: Randomness, n: int = 1) -> tuple[Tensor, Tensor]:
        """n tokens (n,) after ids (1, T), and the rows (n, V) that they were drawn from; the last token is not read. Here step
        by step."""
        tokens, rows = [], []
        for _ in range(n):
            probs = sampling.probs_or_nan(self(ids, cache)[0, -1, : self.n_choices])
            tokens.append(randomness.choose(probs))
            rows.append(probs)
            ids = self.ids_of(tokens[-1])[None]
        return torch.cat(tokens), torch.stack(rows)

    def propose(
        self, unread: list[int], cache: KVCache, sampling: Sampling, randomness: Randomness, n: int
    ) -> tuple[Tensor, Tensor]:
        """`draw` after tokens that the host knows; ids and rows over the whole vocabulary, whatever the model offers."""
        tokens, rows = self.draw(torch.tensor([unread], device=self.device), cache, sampling, randomness, n)
        return self.ids_of(tokens), spread(rows, self.offered, self.config.n_ids)

    def ids_of(self, tokens: Tensor) -> Tensor:
        tokens = tokens.clamp(max=self.n_choices - 1)  # after a row of NaN, which the engine sees itself
        return tokens if self.offered is None else self.offered[tokens]


SIZES = ("n_layers", "n_heads", "n_kv_heads", "head_size", "width", "hidden", "n_ids", "n_offered", "n_choices", "squared",
         "capacity")  # fmt: skip


class Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("attention_norm", "qkv", "out", "mlp_norm", "up", "down")]


class _Model(Structure):
    _fields_ = [
        *((name, c_long) for name in SIZES),
        ("norm_eps", c_double),
        *((name, c_void_p) for name in ("embedding", "cos", "sin", "norm", "head", "offered")),
        ("layers", POINTER(Layer)),
    ]  # fmt: skip


class NativeModel:
    """The weights of ``model`` as native.cpp reads them."""

    def __init__(self, model: Transformer):
        config, kind = model.config, sums(model.dtype)
        self.kept: list[Tensor] = []  # what the pointers point to

        def at(tensor: Tensor) -> int:
            self.kept.append(tensor.detach().contiguous())
            return self.kept[-1].data_ptr()

        self.layers = (Layer * config.n_layers)(*(
            Layer(at(b.attention_norm.weight.to(kind)), at(panels(b.attention.qkv.weight)), at(panels(b.attention.out.weight)),
                  at(b.mlp_norm.weight.to(kind)), at(panels(b.mlp.up.weight)), at(panels(b.mlp.down.weight)))
            for b in model.blocks
        ))  # fmt: skip
        self.n_offered = len(model.head.weight)
        self.n_choices = min(self.n_offered, config.n_ids)
        self.struct = _Model(
            config.n_layers, config.n_heads, config.n_kv_heads, config.head_size, config.width, 4 * config.width,
            config.vocab_size, self.n_offered, self.n_choices, config.activation == "relu2", config.context, config.norm_eps,
            at(model.embedding.weight), at(model.cos.to(kind)), at(model.sin.to(kind)), at(model.norm.weight.to(kind)),
            at(panels(model.head.weight)), None if model.offered is None else at(model.offered), self.layers,
        )  # fmt: skip
        self.n_outputs = self.n_offered + -self.n_offered % library().lanes  # of the panels, padding included
