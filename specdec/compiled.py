"""Short passes on the CPU as programs: the model written in sums, its steps with the drawing in them, rules and sampling.

Decoding is as fast as memory delivers the weights, and between two passes, which sweep the caches of the processor, each
small call of the library's costs several times what it does alone. So there should be few of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model import KVCache, ModelConfig, Transformer
from .passes import FixedShapes
from .products import DTYPES, PanelLinear
from .programs import Program, program_path
from .sampling import Numbers, Randomness, Rule, Sampling

COMPILED = (3, 6, 9)  # rows of the compiled passes, half a minute of compiling each; k is best at most 8
PROMPT = 32  # rows of the one that reads a short prompt; a longer one is read as it is
CHAINS = (5, 4, 1)  # tokens that one program drafts: with its target's own, 5 fill the pass of 6 rows
DEEPEST = 10  # layers of a draft in one program, counting each as often as it runs: compiling takes as long as it is deep
CUT = 64  # rows of the cache that a compiled pass reads more as the text grows


class StreamedLinear(nn.Module):
    """A Linear for the compiler and few rows, of the data types that have no panels: each weight is loaded once and
    multiplied with every row while it is there. Library products are made for more rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)  # (N, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = stored(x.reshape(-1, x.shape[-1])).unbind(0)  # B·T of (C,)
        # the compiler makes one loop of all these sums
        return torch.stack([(self.weight * row).sum(-1) for row in rows]).view(*x.shape[:-1], -1)


def streamed_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """Attention of few queries (B, K, R, D) in plain sums that the compiler fuses with what is around them: a call of the
    library's takes longer than its work."""
    q = stored(q.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5)
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1)  # (B, K, R, S)
    probs = stored(scores.masked_fill(~attn_mask, -torch.inf).softmax(-1))
    # a sum waits for its last addition: several are added up side by side
    groups = next(n for n in (4, 3, 2, 1) if q.shape[2] % n == 0)
    return torch.cat([(part[..., None] * v[:, :, None]).sum(-2) for part in probs.chunk(groups, 2)], 2).to(v.dtype)


def stream(model: Transformer) -> Transformer:
    """``model`` as short passes are compiled from it: attention in sums, products as fast as its data type allows."""
    replace_linears(model, PanelLinear if model.dtype in DTYPES else StreamedLinear)
    for block in model.blocks:
        block.attention.attend = streamed_attention
    return model


def replace_linears(module: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``kind`` of it in the place of every Linear under ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, kind(child))
        else:
            replace_linears(child, kind)


def stored(x: Tensor) -> Tensor:
    """``x``, kept in memory: the compiler would otherwise compute it again for each of the sums that read it."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


class Work(NamedTuple):
    """What one program does: a pass over so many rows, and after it so many steps, each drawing the token that follows."""

    rows: int
    draws: int = 0
    top_k: int | None = None  # the filters of a step's sampling; every temperature is in one program
    top_p: float | None = None


ALONE_WORK = (Work(PROMPT), Work(1, draws=1))  # what a benchmark asks of a model that writes alone
TARGET_WORK = ALONE_WORK + tuple(map(Work, COMPILED))  # … and of one that verifies


def chains(config: ModelConfig) -> tuple[int, ...]:
    """How many tokens a draft's programs draft in one go, longest first."""
    return tuple(n for n in CHAINS if n == 1 or n * config.n_layers <= DEEPEST)


def draft_work(config: ModelConfig) -> tuple[Work, ...]:
    """What a benchmark asks of a draft."""
    return (Work(PROMPT), *(Work(2, draws=n) for n in chains(config)))


class CompiledShapes(FixedShapes):
    """Short passes and steps as compiled programs, for a few numbers of rows. ``short`` is the model that is compiled,
    ``model`` the same one as it reads a prompt. Of the cache a program reads what the text fills, in whole steps of
    ``CUT`` rows."""

    def __init__(self, model: Transformer, short: Transformer, sizes: tuple[int, ...]):
        super().__init__(model, short.forward_at, tuple(n for n in sizes if n <= model.config.context))
        self.short, self.programs = short, {}

    def new_cache(self) -> "CutCache":
        return CutCache(self.config, self.dtype)

    def read(self, ids: Tensor, positions: Tensor, cache: "CutCache") -> Tensor:
        return self.program(Work(ids.shape[1]))(ids, positions, *cache.layers())[0]

    def draw(
        self, ids: Tensor, cache: "CutCache", sampling: Sampling, randomness: Randomness, n: int = 1
    ) -> tuple[Tensor, Tensor]:
        """n tokens (n,) after ids (1, T), and the rows (n, V) that they were drawn from, in one call but for a prompt.
        The last one is not read. Like an accelerator it does not look for NaN."""
        if ids.shape[1] > 2:
            read = self if ids.shape[1] > 2 + COMPILED[-1] else self.model  # a few tokens, once a text, are not worth a program
            read(ids[:, :-2], cache)
            ids = ids[:, -2:]
        rows = ids.shape[1]
        start = cache.append(rows + n - 1)
        steps = self.program(Work(rows, n, sampling.top_k, sampling.top_p))
        chance = randomness.uniforms(n), _number(sampling.temperature)
        return tuple(steps(ids, self.positions[start : start + rows], *chance, *cache.layers()))

    def runs(self, work: Work) -> bool:
        return work.draws > 0 or work.rows in self.sizes

    def program(self, work: Work) -> Program:
        if work not in self.programs:
            self.programs[work] = self.build(work)
        return self.programs[work]

    def build(self, work: Work) -> Program:
        def inputs():
            layers = CutCache(self.config, self.dtype).layers(min(CUT, self.config.context))
            numbers = torch.zeros(work.draws, dtype=torch.float64)
            chance = (numbers, torch.ones(1, dtype=torch.float64)) if work.draws else ()
            return torch.zeros(1, work.rows, dtype=torch.long), torch.arange(work.rows), *chance, layers

        filled = torch.export.Dim("filled", min=2, max=self.config.context)
        layers = [{2: filled}] * (2 * self.config.n_layers)
        if work.draws:
            return Program(*self.key(work), ShortSteps(self.short, work), inputs, (None, None, None, None, layers))
        return Program(*self.key(work), ShortPass(self.short), inputs, (None, None, layers))

    def key(self, work: Work) -> tuple[str, tuple]:
        """Name of the program, and all that it depends on but the code: sizes, type, and the ids that are offered."""
        name = f"pass-of-{work.rows}" + f"-draws-{work.draws}" * (work.draws > 0)
        return name, (work, self.config, self.dtype, _n_offered(self.short))


@cache
def _number(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def _n_offered(model: Transformer) -> int:
    return model.config.vocab_size if model.offered is None else len(model.offered)


class ShortPass(nn.Module):
    """`Transformer.forward_at` as torch.export wants it: ``layers`` are keys of all layers, then values."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, layers: list[Tensor]) -> Tensor:
        n = len(layers) // 2
        return self.model.forward_at(ids, positions, layers[:n], layers[n:])


class ShortSteps(ShortPass):
    """A pass and the draw of the next token out of a uniform number, as often as there are ``numbers`` (n,): the tokens
    (n,), and the rows (n, V) that they were drawn from."""

    def __init__(self, model: Transformer, work: Work):
        super().__init__(model)
        self.filters = Sampling(1, work.top_k, work.top_p)
        self.n_offered = min(_n_offered(model), model.config.n_ids)

    def forward(self, ids: Tensor, positions: Tensor, numbers: Tensor, temperature: Tensor, layers: list[Tensor]):
        tokens, rows = [], []
        for number in numbers.split(1):
            logits = super().forward(ids, positions, layers)[0, -1, : self.n_offered]
            token, probs = self.draw(logits, number, temperature)
            tokens.append(token)
            rows.append(probs)
            token = token.clamp(max=self.n_offered - 1)  # after a row of NaN, which the engine sees itself
            offered = self.model.offered
            ids = (token if offered is None else offered[token])[None]
            positions = positions[-1:] + 1
        return torch.cat(tokens), torch.stack(rows)

    def draw(self, logits: Tensor, number: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """One token (1,) from logits (V,), and the row (V,) that it was drawn from."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        largest, ids = logits.amax(), torch.arange(self.n_offered)
        first = torch.where(logits == largest, ids, self.n_offered).amin()  # an argmax that the compiler vectorises
        least = torch.finfo(logits.dtype).tiny  # as in Sampling, whose temperature this is
        warm = (logits - largest) / temperature.to(logits.dtype).clamp(min=least)
        scores = torch.where(temperature > 0, warm, torch.where(ids == first, 0.0, -torch.inf))
        probs = torch.where(logits.sum().isfinite(), self.filters.of_finite(scores), torch.nan)
        return Numbers(number).choose(probs), probs


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
    """`Sampling` whose rows of a verifying pass come out of one program, which like an accelerator does not look for
    NaN."""

    def probs(self, logits: Tensor, model: str = "model") -> Tensor:
        if logits.dim() != 2 or len(logits) == 1:  # no verifying pass
            return super().probs(logits, model)
        return _rows_program(self, *_kind(logits))(logits.contiguous())[0]


def _kind(logits: Tensor) -> tuple[int, torch.dtype]:
    return logits.shape[-1], logits.dtype


@cache
def _rows_program(sampling: Sampling, n_ids: int, dtype: torch.dtype) -> Program:
    def inputs():
        return (torch.zeros(5, n_ids, dtype=dtype),)

    rows = {0: torch.export.Dim("rows", min=2, max=1024)}
    return Program(*_rows_key(sampling, n_ids, dtype), Function(sampling.probs_or_nan), inputs, ((rows,),), threads=1)


def _rows_key(sampling: Sampling, n_ids: int, dtype: torch.dtype) -> tuple[str, tuple]:
    return "probs", (sampling, n_ids, dtype)


class CompiledRule:
    """A rule as one program for k = 1 and one for every other k."""

    def __init__(self, rule: Rule):
        self.rule = rule

    def __call__(self, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness):
        k, n_ids = draft_probs.shape
        if k == 0:
            return self.rule(drafted, draft_probs, target_probs, randomness)
        program = _rule_program(self.rule, k == 1, n_ids, draft_probs.dtype, target_probs.dtype)
        numbers = randomness.uniforms(k + 1)
        return tuple(program(drafted, draft_probs.contiguous(), target_probs.contiguous(), numbers))


@cache
def _rule_program(rule: Rule, single: bool, n_ids: int, draft_dtype: torch.dtype, target_dtype: torch.dtype) -> Program:
    def inputs():
        n = 1 if single else 4
        p, drafted = torch.ones(n + 1, n_ids) / n_ids, torch.zeros(n, dtype=torch.long)
        return drafted, p[:n].to(draft_dtype), p.to(target_dtype), torch.zeros(n + 1, dtype=torch.float64)

    def decide(drafted, draft_probs, target_probs, numbers):
        return rule(drafted, draft_probs, target_probs, Numbers(numbers))

    k = torch.export.Dim("k", min=2, max=1024)
    shapes = None if single else (({0: k}, {0: k}, {0: k + 1}, {0: k + 1}),)
    key = _rule_key(rule, single, n_ids, draft_dtype, target_dtype)
    return Program(*key, Function(decide), inputs, shapes, threads=1)


def _rule_key(rule: Rule, *parts) -> tuple[str, tuple]:
    return rule.__name__, (rule.__name__, *parts)


def decisions(rule: Rule, samplings: Sequence[Sampling], target: CompiledShapes) -> dict[Path, Callable]:
    """What a benchmark's rounds decide with: where its programs are kept, and what compiles each."""
    n_ids, dtype = target.config.n_ids, torch.promote_types(target.dtype, torch.float32)
    rows = [(s, n_ids, target.dtype) for s in samplings]
    rules = [(rule, single, n_ids, dtype, dtype) for single in (True, False)]
    return {program_path(*_rows_key(*x), threads=1): partial(_rows_program, *x) for x in rows} | {
        program_path(*_rule_key(*x), threads=1): partial(_rule_program, *x) for x in rules
    }


class Function(nn.Module):
    """A function as torch.export wants it."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)
