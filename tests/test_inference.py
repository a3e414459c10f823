"""Every fast path against the plain one: fixed shapes, compiled passes, captured drafts, trimmed output layers."""

import pytest
import torch
from conftest import make_model, needs_compiler
from oracle import engine_law, own_law, total_variation
from torch import nn

from specdec import inference, native
from specdec.compiled import CompiledModel, PanelCache
from specdec.drafting import AdaptiveDraftModel, CapturedDraftModel, ChainedDraftModel, DraftModel, PromptLookup, frequent_ids
from specdec.engine import Trace, generate, speculate
from specdec.inference import PASSES, PackedLinear, draw_next, next_probs, ready, ready_rule, trimmed
from specdec.model import Transformer
from specdec.native import MOST, PanelLinear
from specdec.passes import EXACT_ROWS, Captured, CapturedShapes, FixedShapes
from specdec.profiles import get_profile
from specdec.sampling import RULES, Numbers, Randomness, Sampling, token_wise


def texts(target, drafter, seeds=range(8), prompt=(1, 0, 2), n=11, k=3, **options):
    out = []
    for seed in seeds:
        trace = Trace()
        tokens = speculate(target, list(prompt), drafter=drafter, k=k, max_new_tokens=n, randomness=Randomness(seed),
                           trace=trace, **options)  # fmt: skip
        out.append((list(tokens), [(r.drafted, r.accepted) for r in trace.rounds]))
    return out


@torch.inference_mode()
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2}, {"n_heads": 4, "n_kv_heads": 1}])
def test_a_pass_of_fixed_shape_is_the_same_pass(shape):
    model = make_model(context=32, **shape)
    cache, fixed = model.new_cache(), model.new_cache()
    ids = torch.randint(0, 5, (1, 9), generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 4), (4, 5), (5, 9)):
        logits = model(ids[:, start:end], cache)
        positions = torch.arange(start, end)
        torch.testing.assert_close(model.forward_at(ids[:, start:end], positions, fixed.k, fixed.v), logits)
    torch.testing.assert_close(fixed.k, cache.k)


@torch.inference_mode()
def test_rows_beyond_the_text_do_not_matter():
    model = make_model(context=16)
    cache = model.new_cache()
    clean = model.forward_at(torch.tensor([[1, 2]]), torch.arange(2), cache.k, cache.v)
    cache.k.normal_(), cache.v.normal_()
    torch.testing.assert_close(model.forward_at(torch.tensor([[1, 2]]), torch.arange(2), cache.k, cache.v), clean)


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(8,), (1, 4), (1, 2, 3)])
def test_repeating_the_last_token_changes_nothing(sizes):
    """Up to the last row of the context, where there is no room for other padding."""
    model = make_model(context=12)
    fixed = FixedShapes(model, model.forward_at, sizes)
    cache, other = model.new_cache(), fixed.new_cache()
    ids = torch.randint(0, 5, (1, 12), generator=torch.Generator().manual_seed(1))
    for start, end in ((0, 3), (3, 4), (4, 7), (7, 11), (11, 12)):
        torch.testing.assert_close(fixed(ids[:, start:end], other), model(ids[:, start:end], cache))
    assert other.length == cache.length == 12


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [5, 8, 16, 40, 96])
def test_products_of_few_rows(dtype, outputs):
    """Every number of rows, blocks that end early, panels in ones, twos and fours, padded ones."""
    for width in (1, 63, 130):
        linear = nn.Linear(width, outputs, bias=False, dtype=dtype)
        fast, x = PanelLinear(linear), torch.randn(MOST, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
        for rows in range(1, MOST + 1):
            torch.testing.assert_close(fast(x[None, :rows]), linear(x[None, :rows]))
        torch.testing.assert_close(fast(x.t().contiguous().t()[3:7]), linear(x[3:7]))  # rows that lie apart
    with pytest.raises(ValueError, match="at most 32"):
        fast(torch.zeros(33, width, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("width", [1, 63, 130])
def test_products_with_bfloat16_weights_are_summed_in_float32(width):
    """Of rows that are rounded first where the processor multiplies pairs of bfloat16: to the nearest, ties to even."""
    weight = nn.Linear(width, 40, bias=False).bfloat16()
    fast, x = PanelLinear(weight), torch.randn(MOST, width, generator=torch.Generator().manual_seed(0))
    x[0] = 1 + 2**-8  # a tie
    rounded = x.bfloat16().float() if native.library().pairs else x
    for rows in range(1, MOST + 1):
        torch.testing.assert_close(fast(x[:rows]), rounded[:rows] @ weight.weight.float().t(), rtol=1e-5, atol=1e-5)
    x[0, 0] = torch.nan
    assert fast(x)[0].isnan().all() and fast(x)[1:].isfinite().all()


@needs_compiler
def test_what_panels_cannot_multiply_is_refused():
    with pytest.raises(ValueError, match="choose float32, float64 or bfloat16"):
        PanelLinear(nn.Linear(8, 8, bias=False, dtype=torch.float16))
    with pytest.raises(ValueError, match="choose float32, float64 or bfloat16"):
        ready(make_model(), torch.float16, "compiled")
    with pytest.raises(ValueError, match="rows of 7 numbers were given where 8 are multiplied"):
        PanelLinear(nn.Linear(8, 8, bias=False))(torch.zeros(1, 7))


@needs_compiler
def test_the_library_is_compiled_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path))
    path, place = native.library_path(), native.put_in_place

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "put_in_place", cut)
    with pytest.raises(KeyboardInterrupt):
        native.library.__wrapped__()
    (partial,) = path.parent.iterdir()  # nobody takes it for the library
    place(partial, path)
    monkeypatch.setattr(native, "build", cut)
    assert native.library.__wrapped__().multiply
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DANOTHER"))
    assert native.library_path() != path


@needs_compiler
@torch.inference_mode()
def test_a_model_made_ready_is_the_same_model():
    """A prompt, which oneDNN multiplies, then a few tokens at a time."""
    model = Transformer(get_profile("ci").models["target"], torch.Generator().manual_seed(0)).eval()
    fast = ready(model, "float32")
    cache, other = model.new_cache(), fast.new_cache()
    for ids in torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(2)).split([30, 1, 2, 9, 17, 1], 1):
        torch.testing.assert_close(fast(ids, other), model(ids, cache))


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    """As where there is none, after a warning."""
    def fails():
        raise RuntimeError("unknown argument: '-ftree-loop-vectorize'")

    monkeypatch.setattr(native, "library", fails)
    monkeypatch.setattr(native, "can_compile", lambda: True)
    native.has_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="native.cpp cannot be compiled .*, so decoding is slower; set CXX"):
            fast = ready(make_model(), "float32", "compiled")
        assert isinstance(fast, Transformer) and not isinstance(fast.head, inference.SplitLinear)
        assert len(list(generate(fast, [1], max_new_tokens=3))) == 3
        assert ready_rule.__wrapped__(token_wise, "compiled") is token_wise
    finally:
        native.has_library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("clang", [False, True])
def test_flags_of_gcc_are_for_gcc(clang, monkeypatch, tmp_path):
    """And what stands before the compiler's name in CXX is left out."""
    from torch._inductor import cpp_builder

    asked = []
    monkeypatch.setenv("CXX", "ccache g++")
    monkeypatch.setattr(cpp_builder, "is_gcc", lambda: not clang)
    monkeypatch.setattr(cpp_builder.CppBuilder, "build", lambda self: asked.append(self.get_command_line()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        native.build(tmp_path / "native.so")
    assert asked[0].startswith("g++ ") and (native.FLAGS[0] in asked[0]) == (not clang)


SHAPES = [
    {}, {"n_kv_heads": 2}, {"n_heads": 4, "n_kv_heads": 1}, {"width": 20, "n_heads": 2, "vocab_size": 13},
    {"width": 24, "n_heads": 2, "n_layers": 1, "context": 131}, {"activation": "relu2"},
]  # fmt: skip


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_passes_are_the_same_passes(shape, dtype, threads):
    """A prompt longer than a pass, single tokens, several, up to the last row of the context, rolled back and read again;
    whatever stands in the cache beyond the text. Widths and heads that fill no panel, more threads than heads."""
    model = make_model(**{"context": 130} | shape, scale=2.0).to(dtype)
    fast, context = ready(model, dtype, "compiled"), model.config.context
    near = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps} if dtype == torch.bfloat16 else {}
    cache, other = model.new_cache(), fast.new_cache()
    other.k.fill_(7), other.v.fill_(7)
    ids = torch.randint(0, 5, (1, context), generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(threads)
    try:
        for start, end in ((0, 60), (60, 61), (61, 62), (62, 66), (66, 75), (75, 126), (126, context)):
            logits = model(ids[:, start:end], cache)
            torch.testing.assert_close(fast(ids[:, start:end], other).to(dtype), logits, **near)
            other.truncate(end - 1), cache.truncate(end - 1)
            last = fast(ids[:, end - 1 : end], other).to(dtype)
            torch.testing.assert_close(last, model(ids[:, end - 1 : end], cache), **near)
    finally:
        torch.set_num_threads(1)
    other.truncate(context - 3)
    assert torch.equal(fast(ids[:, -3:].int(), other)[:, -1:].to(dtype), last)
    with pytest.raises(ValueError, match=f"the cache holds {context} tokens"):
        fast(ids[:, :1], other)
    with pytest.raises(ValueError, match="give at least one"):
        fast(ids[:, :0], other)


@needs_compiler
@torch.inference_mode()
def test_ids_that_the_model_does_not_have_are_refused():
    fast = ready(make_model(), torch.float64, "compiled")
    for ids in ([[8]], [[1, -1]]):
        with pytest.raises(IndexError, match="use the model's own tokenizer"):
            fast(torch.tensor(ids), fast.new_cache())
        with pytest.raises(IndexError, match="use the model's own tokenizer"):
            fast.draw(torch.tensor(ids), fast.new_cache(), Sampling(), Randomness(0))


@needs_compiler
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=2)], ids=str)
def test_passes_without_a_batch_read_one_text_with_a_token_in_it(sampling):
    fast = ready(make_model(), torch.float64, "compiled")
    asked = fast.new_cache(), sampling, Randomness(0)
    for model in (fast, ready(make_model(), torch.float64, "graphs"), ready(make_model(), torch.float64, exact=True)):
        with pytest.raises(ValueError, match="2 texts were given to a model that reads one"):
            model(torch.tensor([[1, 2], [2, 1]]), model.new_cache())
        with pytest.raises(ValueError, match="give at least one"):
            model(torch.empty(1, 0, dtype=torch.long), model.new_cache())
    with pytest.raises(ValueError, match="give ids of shape"):
        fast.draw(torch.tensor([[1], [2]]), *asked)
    for call in (lambda: fast.draw(torch.empty(1, 0, dtype=torch.long), *asked), lambda: fast.propose([], *asked, 2)):
        with pytest.raises(ValueError, match="give at least one"):
            call()
    assert asked[0].length == 0


SAMPLINGS = [Sampling(), Sampling(0), Sampling(0.3), Sampling(1e-40), Sampling(0.7, top_k=4, top_p=0.9)]
SHAPE = {"context": 130, "n_layers": 1, "n_kv_heads": 2}


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_compiled_steps_draw_the_same_tokens(sampling):
    """A prompt, one token, two."""
    model = make_model(**SHAPE)
    plain, fast = ready(model, torch.float64), ready(model, torch.float64, "compiled")
    assert isinstance(fast, CompiledModel)
    cache, other = plain.new_cache(), fast.new_cache()
    for ids in ([1, 0, 2, 1, 4], [3], [2, 2], [0], [1, 4]):
        for seed in range(5):
            (mine, q), (token, probs) = (
                draw_next(m, torch.tensor([ids]), c, sampling, Randomness(seed)) for m, c in ((fast, other), (plain, cache))
            )
            assert torch.equal(mine, token) and cache.length == other.length
            torch.testing.assert_close(q, probs)
            assert q.shape == (1, 5)
            for c in (cache, other):
                c.truncate(c.length - len(ids) * (seed < 4))


EDGES = [0, 1, 255, 256, 257, 511, 512, 640, 699]  # ids at both ends of the parts in which compiled passes choose


def number_of(weights, i):
    """The uniform number in the middle of what belongs to index i of ``weights``."""
    cdf = weights.double().cumsum(-1)
    return float((cdf[i] - weights[i].double() / 2) / cdf[-1])


@needs_compiler
@torch.inference_mode()
def test_compiled_steps_draw_every_id_of_a_large_vocabulary():
    model = make_model(scale=1.0, vocab_size=704, n_ids=700, **SHAPE)
    plain, fast = ready(model, torch.float64), ready(model, torch.float64, "compiled")
    ids = torch.tensor([[1, 650, 2]])
    q = next_probs(plain, ids, plain.new_cache(), Sampling())[-1]
    for i in EDGES:
        chance = Numbers(torch.tensor([number_of(q, i)], dtype=torch.float64))
        token, probs = draw_next(fast, ids, fast.new_cache(), Sampling(), chance)
        assert token.tolist() == [i] and probs.shape == (1, 700)


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_compiled_rule_lets_every_id_of_a_large_vocabulary_follow(dtype, rule):
    """After a refusal those that the residual holds, and as the bonus all."""
    plain, fast = RULES[rule], ready_rule(RULES[rule], "compiled")
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(3, 700, dtype=dtype, generator=generator).softmax(-1)
    q = torch.full((2, 700), 1 / 700, dtype=dtype)
    q[:, EDGES] /= 2  # so that the residual holds these
    q /= q.sum(-1, keepdim=True)
    drafted = (p[:2] - q).argmin(-1)  # less likely than q says, or they could not be refused
    rest = (p[0] - q[0]).clamp(min=0)
    assert all(rest[EDGES] > 0)
    for coin, weights, accepted in ((1 - 2**-53, rest, 0), (0.0, p[2], 2)):
        for i in EDGES:
            numbers = torch.tensor([coin, coin, number_of(weights, i)], dtype=torch.float64)
            for decide in (fast, plain):
                kept, following = decide(drafted, q, p, Numbers(numbers.clone()))
                assert (int(kept), int(following)) == (accepted, i)


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_compiled_model_that_is_broken_is_named(sampling, rule, value):
    target = make_model(**SHAPE)
    fast = ready(target, torch.float64, "compiled")
    target.head.weight.data[0, 0] = value
    broken = ready(target, torch.float64, "compiled")
    options = {"rule": ready_rule(RULES[rule], "compiled"), "sampling": sampling, "max_new_tokens": 5}
    with pytest.raises(ValueError, match="the target produced a logit that is not finite"):
        list(generate(broken, [1], max_new_tokens=2, sampling=sampling))
    with pytest.raises(ValueError, match="the target produced a logit that is not finite"):
        list(speculate(broken, [1], drafter=ChainedDraftModel(fast), k=2, **options))
    for drafter in (DraftModel, ChainedDraftModel):
        with pytest.raises(ValueError, match="the draft model produced a logit that is not finite"):
            list(speculate(fast, [1], drafter=drafter(broken), k=2, **options))


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_compiled_text_is_the_same_text(sampling, rule):
    target, draft = (make_model(seed=seed, **SHAPE) for seed in (1, 2))
    fast, drafts = (ready(model, torch.float64, "compiled") for model in (target, draft))
    options = {"rule": ready_rule(RULES[rule], "compiled"), "sampling": sampling}
    plain = texts(target, DraftModel(draft), rule=RULES[rule], sampling=sampling)
    for drafter in (DraftModel(drafts), AdaptiveDraftModel(drafts, least=0), ChainedDraftModel(drafts)):
        assert texts(fast, drafter, **options) == plain
    assert texts(fast, PromptLookup(5), **options) == texts(target, PromptLookup(5), rule=RULES[rule], sampling=sampling)
    own, plain = (
        list(generate(model, [1], max_new_tokens=12, sampling=s, randomness=Randomness(3)))
        for model, s in ((fast, options["sampling"]), (target, sampling))
    )
    assert own == plain


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1, top_k=3)], ids=str)
def test_chained_drafts_are_the_same_drafts(sampling):
    """Long proposals of a trimmed draft, from a text of one token and from longer ones, to the end of the context; and no
    round reads more than it must."""
    ids = torch.tensor([0, 2, 3, 4])
    target, draft = (make_model(seed=seed, **SHAPE | {"context": 20}) for seed in (1, 2))
    plain = DraftModel(trimmed(draft, ids))
    chained = ChainedDraftModel(ready(trimmed(draft, ids), torch.float64, "compiled"))
    for k in (1, 3, 7):
        for prompt in ([1], [1, 0], [1, 0, 2, 4], [1, 0, 2, 4] * 3 + [2]):
            mine, theirs = (texts(target, d, k=k, n=20 - len(prompt), prompt=prompt, sampling=sampling) for d in (chained, plain))
            assert mine == theirs
    read, propose, trace = [], chained.model.propose, Trace()
    chained.model.propose = lambda unread, *others: read.append(len(unread)) or propose(unread, *others)
    list(speculate(draft, [1, 0, 2, 4], drafter=chained, k=3, max_new_tokens=16, randomness=Randomness(0), trace=trace))
    assert any(r.accepted == 3 for r in trace.rounds) and read[0] == 4 and set(read[1:]) == {1, 2}


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_rows_are_the_same_rows(sampling, dtype):
    """Of a short vocabulary and of one that several threads share, with ties; one row, several, a prompt."""
    for n_ids, vocab_size in ((5, 8), (700, 704)):
        model = make_model(n_ids=n_ids, vocab_size=vocab_size, **SHAPE)
        model.head.weight.data[[2, n_ids // 2, n_ids - 1]] = 3 * model.head.weight.data[1]
        fast = ready(model, dtype, "compiled")
        cache, other = fast.new_cache(), fast.new_cache()
        for ids in ([1], [0, 2], [4, 4, 1, 2, 3], [3] * 40):
            ids = torch.tensor([ids])
            mine, theirs = next_probs(fast, ids, cache, sampling), sampling.probs(fast(ids, other)[0, :, :n_ids])
            assert cache.length == other.length
            torch.testing.assert_close(mine, theirs)
        for value in (torch.nan, -torch.inf):  # one logit, of the last part
            model.head.weight.data[n_ids - 1] = value
            broken = ready(model, dtype, "compiled")
            assert next_probs(broken, torch.tensor([[0, 2, 3]]), broken.new_cache(), sampling).isnan().all()


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_compiled_rule_decides_the_same(dtype, rule):
    """Refusals at every position, full acceptance, a draft equal to the target, one-hot rows, a row of NaN."""
    rule, generator = RULES[rule], torch.Generator().manual_seed(1)
    fast = ready_rule(rule, "compiled")
    assert fast is not rule
    seen = set()
    for k in (0, 1, 2, 8, *[5] * 12):
        p, q = (torch.randn(n, 5, dtype=dtype, generator=generator).softmax(-1) for n in (k + 1, k))
        one = torch.nn.functional.one_hot(torch.randint(0, 5, (k + 1,), generator=generator), 5).to(dtype)
        drafted = torch.randint(0, 5, (k,), generator=generator)
        for rows in ((q, p), (p[:k], p), (one[:k], p), (q, one), (q, p.index_fill(0, torch.tensor([k // 2]), torch.nan))):
            drafts = rows[0].argmax(-1) if rows[0] is not q else drafted
            for seed in range(20):
                mine, plain = (decide(drafts, *rows, Randomness(seed)) for decide in (fast, rule))
                assert [int(x) for x in mine] == [int(x) for x in plain]
                seen.add((k, int(mine[0])))
    assert {(5, n) for n in range(6)} <= seen
    mixed = torch.tensor([0]), q[:1].float(), p[:2].double()  # of two types
    for seed in range(20):
        assert [int(x) for x in fast(*mixed, Randomness(seed))] == [int(x) for x in rule(*mixed, Randomness(seed))]
    with pytest.raises(IndexError):
        fast(torch.tensor([5]), q[:1], p[:2], Randomness(0))
    for drafted, rows in ((torch.tensor([1]), p[:3]), (torch.tensor([1, 2]), p[:2]), (torch.tensor([1, 2]), p[:3, :4])):
        with pytest.raises(ValueError, match="cannot be judged"):
            fast(drafted, q[:2], rows, Randomness(0))

    def another(*_): ...

    assert ready_rule(another, "compiled") is another and ready_rule(rule) is rule


def test_a_rule_that_a_reader_adds_runs_as_it_is(monkeypatch):
    def another(*_): ...

    monkeypatch.setitem(RULES, "another", another)
    assert ready_rule.__wrapped__(another, "compiled") is another


class Highest(Randomness):
    """Always the last index that is possible."""

    def choose(self, probs):
        return probs.nonzero()[-1]


DRAFTERS = {
    "step by step": DraftModel, "captured": CapturedDraftModel,
    "chained": pytest.param(lambda m: ChainedDraftModel(ready(m, torch.float64, "compiled")), marks=needs_compiler),
}  # fmt: skip
EVERY_DRAFTER = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)


@needs_compiler
@EVERY_DRAFTER
@pytest.mark.parametrize("rule", RULES)
def test_whoever_chooses_is_asked_on_fast_paths_too(rule, drafter):
    """The same two verbs decide everything: of an oracle, and of chance that was written anew."""
    target, draft = (make_model(2, 8, seed, vocab_size=4, n_ids=3, context=8) for seed in (1, 2))
    fast, judge = ready(target, torch.float64, "compiled"), ready_rule(RULES[rule], "compiled")
    law = engine_law(fast, drafter(draft), [1, 0], k=2, n=3, rule=judge)
    assert total_variation(law, own_law(target, [1, 0], Sampling(), 3)) < 1e-12
    text = speculate(fast, [1], drafter=drafter(draft), k=2, max_new_tokens=5, rule=judge, randomness=Highest(0))
    assert all(token == 2 for token in text)


@EVERY_DRAFTER
def test_one_text_at_a_time_on_a_drafter(pair, drafter):
    made = drafter(pair[1])
    first, second = (speculate(pair[0], [1] * n, drafter=made, k=2, max_new_tokens=15 - n) for n in (1, 9))
    next(first), next(second)
    with pytest.raises(ValueError, match="another text was begun with this drafter"):
        list(first)


@EVERY_DRAFTER
@pytest.mark.parametrize("rule", RULES)
def test_where_the_draft_ends_the_target_goes_on(rule, drafter):
    """Every draft that the shorter context has room for, then plain steps; a prompt that the draft cannot read."""
    target, draft = make_model(2, 16, 1, context=30), make_model(1, 8, 2, context=12)
    for model in (draft, make_model(2, 16, 1, context=12)):  # the second is always right
        for n in (1, 2, 10, 11, 12, 13, 20):
            for k in (1, 3, 20):
                trace, options = Trace(), dict(max_new_tokens=40, sampling=Sampling(0))
                text = speculate(target, [1] * n, drafter=drafter(model), k=k, rule=RULES[rule], trace=trace, **options)
                assert list(text) == list(generate(target, [1] * n, **options)) and trace.finish == "context"
                room = [max(0, min(k, 30 - r.start - 1, 12 - r.start + 1)) for r in trace.rounds]
                assert [len(r.drafted) for r in trace.rounds] == room


@torch.inference_mode()
@pytest.mark.parametrize("options", [{"passes": "graphs"}, {"exact": True}], ids=str)
def test_a_bad_text_does_not_spoil_the_next(options, pair):
    fast, drafts = (ready(model, torch.float64, **options) for model in pair)
    drafters = DraftModel(drafts), CapturedDraftModel(pair[1])
    clean = [texts(fast, drafter, n=8) for drafter in drafters]
    for drafter in drafters:
        drafter.cache.k.fill_(torch.nan), drafter.cache.v.fill_(torch.nan)
    if isinstance(fast, CapturedShapes):
        fast.cache.k.fill_(torch.nan), fast.cache.v.fill_(torch.nan)
    assert [texts(fast, drafter, n=8) for drafter in drafters] == clean


@needs_compiler
@torch.inference_mode()
def test_compiled_models_do_not_share_their_caches():
    """Two texts at a time on one model."""
    fast = ready(make_model(**SHAPE), torch.float64, "compiled")
    alone = [list(generate(fast, [x], max_new_tokens=9, randomness=Randomness(x))) for x in (1, 2)]
    streams = [generate(fast, [x], max_new_tokens=9, randomness=Randomness(x)) for x in (1, 2)]
    assert [list(text) for text in zip(*zip(*streams))] == alone
    assert isinstance(fast.new_cache(), PanelCache)


def test_compiled_passes_are_for_two_kinds_of_machine():
    with pytest.raises(ValueError, match="are for CPUs and CUDA, not for meta; choose eager"):
        ready(make_model().to("meta"), torch.float32, "compiled")


@pytest.mark.parametrize("passes", [name for name in PASSES if name != "compiled"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(1.3, top_k=3)], ids=str)
def test_the_same_text_by_every_path(pair, passes, rule, sampling):
    target, draft = pair
    plain = texts(target, DraftModel(draft), rule=RULES[rule], sampling=sampling)
    fast = ready(target, torch.float64, passes)
    assert texts(fast, DraftModel(ready(draft, torch.float64, passes)), rule=RULES[rule], sampling=sampling) == plain
    assert texts(fast, CapturedDraftModel(draft), rule=RULES[rule], sampling=sampling) == plain


def test_captured_drafts_reach_the_end_of_the_context(pair):
    target, draft = pair
    for prompt, n in (([1], 15), ([3, 1], 14), ([0] * 9, 7), ([2] * 15, 1)):
        plain = texts(target, DraftModel(draft), prompt=prompt, n=n, k=5)
        assert texts(target, CapturedDraftModel(draft), prompt=prompt, n=n, k=5) == plain
        assert all(len(tokens) == n for tokens, _ in plain)


def test_captured_drafts_are_as_long_as_their_text_asks(pair, monkeypatch):
    """Each text's own k, whatever k others had before; its last rounds, which may use fewer, need no other graph."""
    target, draft = pair
    drafter, passes = CapturedDraftModel(draft), []
    chain = CapturedDraftModel.chain
    monkeypatch.setattr(CapturedDraftModel, "chain", lambda self, *given: passes.append(len(given[-1])) or chain(self, *given))
    for k in (4, 2, 3):
        passes.clear()
        assert texts(target, drafter, k=k) == texts(target, DraftModel(draft), k=k)
        assert set(passes) <= {2, 3, 4} and passes[0] == max(passes) == k
    assert {width for _, width in drafter.graphs} == {2, 3, 4}


def test_kept_rows_are_not_overwritten_by_later_rounds(pair):
    target, draft = pair
    trace, plain = Trace(keep_probs=True), Trace(keep_probs=True)
    for drafter, into in ((CapturedDraftModel(draft), trace), (DraftModel(draft), plain)):
        list(speculate(target, [1], drafter=drafter, k=2, max_new_tokens=9, randomness=Randomness(3), trace=into))
    for mine, theirs in zip(trace.rounds, plain.rounds, strict=True):
        torch.testing.assert_close(mine.draft_probs, theirs.draft_probs)


def test_one_text_at_a_time_on_a_captured_model(pair):
    target = ready(pair[0], torch.float64, "graphs")
    first = generate(target, [1], max_new_tokens=4)
    next(first)
    list(generate(target, [2], max_new_tokens=4))
    with pytest.raises(ValueError, match="one text at a time"):
        next(first)


def test_a_captured_function_reads_its_own_buffers():
    calls = []
    captured = Captured(lambda x, y: calls.append((x, y)) or x + y, torch.zeros(2), torch.ones(2))
    assert captured(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).tolist() == [4, 6]
    captured(torch.zeros(2), torch.zeros(2))
    assert calls[0][0] is calls[1][0]
    with pytest.raises(RuntimeError):
        captured(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("rule", RULES)
def test_a_trimmed_draft_never_offers_what_it_does_not_have(pair, rule):
    target, draft = pair
    ids = torch.tensor([1, 2, 4])
    drafter = DraftModel(trimmed(draft, ids))
    trace = Trace(keep_probs=True)
    list(speculate(target, [0], drafter=drafter, k=3, rule=RULES[rule], max_new_tokens=15, trace=trace))
    assert all(r.draft_probs[:, [0, 3]].sum() == 0 for r in trace.rounds)
    assert {x for r in trace.rounds for x in r.drafted} <= {1, 2, 4}
    assert texts(target, CapturedDraftModel(trimmed(draft, ids))) == texts(target, drafter)


@torch.inference_mode()
def test_trimming_keeps_the_logits_of_what_it_keeps(pair):
    ids = torch.tensor([0, 3])
    text = torch.tensor([[1, 2, 4]])
    torch.testing.assert_close(trimmed(pair[1], ids)(text), pair[1](text)[..., ids])
    assert pair[1].head.weight.shape[0] == 8  # the model itself is as it was


def test_an_adaptive_draft_looks_at_q_alone(pair):
    target, draft = pair
    always, never = (texts(target, AdaptiveDraftModel(draft, least=least), k=4) for least in (0, 1))
    assert always == texts(target, DraftModel(draft), k=4)
    assert {len(drafted) for _, rounds in never for drafted, _ in rounds} <= {0, 1}
    trace = Trace(keep_probs=True)
    list(speculate(target, [1], drafter=AdaptiveDraftModel(draft, least=0.3), k=4, max_new_tokens=14, trace=trace))
    for r in trace.rounds[:-3]:
        sure = r.draft_probs.amax(-1).cumprod(0)
        assert (sure[:-1] >= 0.3).all() and (len(r.drafted) == 4 or sure[-1] < 0.3)
    with pytest.raises(ValueError, match="give a probability"):
        AdaptiveDraftModel(draft, least=1.5)


def test_ids_that_no_tokenizer_has_are_refused(pair):
    with pytest.raises(ValueError, match="outside 0 … 4"):
        trimmed(pair[1], torch.tensor([1, 5]))
    for ids in ([], [0, 0, 1]):
        with pytest.raises(ValueError, match="no id at all, or one of them twice"):
            trimmed(pair[1], torch.tensor(ids, dtype=torch.long))
    with pytest.raises(ValueError, match="was trimmed before"):
        trimmed(trimmed(pair[1], torch.tensor([1, 2])), torch.tensor([1]))


@needs_compiler
def test_ids_of_any_integer_type(pair):
    """native.cpp reads 64 bits."""
    wide, narrow = (trimmed(pair[1], torch.tensor([1, 2, 4], dtype=dtype)) for dtype in (torch.long, torch.int32))
    wide, narrow = (ChainedDraftModel(ready(model, torch.float64, "compiled")) for model in (wide, narrow))
    assert texts(pair[0], narrow) == texts(pair[0], wide)


def test_a_trimmed_target_is_refused(pair):
    """Its rows have numbers that are not ids."""
    target = trimmed(pair[0], torch.tensor([1, 2, 4]))
    for arm in (generate(target, [1], max_new_tokens=2),
                speculate(target, [1], drafter=DraftModel(pair[1]), k=1, max_new_tokens=2)):  # fmt: skip
        with pytest.raises(ValueError, match="the target's output layer is trimmed"):
            list(arm)


def test_frequent_ids(toy_data):
    counts = torch.bincount(torch.from_numpy(toy_data.train.astype(int)), minlength=257)
    kept = frequent_ids(toy_data, 10)
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 10
    assert counts[kept].min() >= max(count for i, count in enumerate(counts.tolist()) if i not in kept.tolist())
    with pytest.raises(ValueError, match="cannot be kept"):
        frequent_ids(toy_data, 0)


def test_unknown_passes():
    with pytest.raises(ValueError, match="eager, compiled, graphs"):
        ready(make_model(), passes="fast")


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int64, "Tensor"])
def test_unknown_types(dtype):
    with pytest.raises(ValueError, match="choose auto, float32, bfloat16, float16, float64"):
        ready(make_model(), dtype)


@needs_compiler
@pytest.mark.parametrize("options", [{"passes": "compiled"}, {"passes": "graphs"}, {}], ids=str)
def test_what_is_ready_is_not_made_ready_again(options):
    fast = ready(make_model(), "float32", **options)
    if not isinstance(fast, Transformer) or isinstance(fast.head, PackedLinear):
        with pytest.raises(ValueError, match="was made ready before"):
            ready(fast)


PATHS = pytest.mark.parametrize(
    "dtype, passes",
    [pytest.param(d, p, marks=[needs_compiler] * (p != "eager")) for p in ("eager", "compiled") for d in ("float32", "bfloat16")],
)


class TestExact:
    """The same bits however many tokens are read together."""

    @pytest.fixture(scope="class")
    def model(self):
        config = get_profile("ci").models["target"]
        model = Transformer(config, torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.mul_(3)
        return model

    @torch.inference_mode()
    @PATHS
    def test_logits_do_not_depend_on_the_company(self, model, dtype, passes):
        exact = ready(model, dtype, passes, exact=True)
        ids = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(2))
        cache = exact.new_cache()
        one_by_one = torch.cat([exact(ids[:, i : i + 1], cache) for i in range(60)], 1)
        for size in (2, 3, 7, 10, 16):
            cache.truncate(0)
            assert torch.equal(one_by_one, torch.cat([exact(block, cache) for block in ids.split(size, 1)], 1))

    @PATHS
    def test_greedy_text_is_the_target_s_own_token_for_token(self, model, dtype, passes):
        exact = ready(model, dtype, passes, exact=True)
        drafter = DraftModel(ready(model, dtype))  # agrees nearly always: long blocks are accepted
        for start in range(6):
            own = list(generate(exact, [start], max_new_tokens=60, sampling=Sampling(0)))
            for k in (1, 4, 15):
                text = speculate(exact, [start], drafter=drafter, k=k, max_new_tokens=60, sampling=Sampling(0))
                assert list(text) == own

    def test_a_block_that_does_not_fit(self, model):
        exact = ready(model, exact=True)
        stream = speculate(exact, [1] * 20, drafter=DraftModel(model), k=EXACT_ROWS, max_new_tokens=30)
        with pytest.raises(ValueError, match="choose k ≤ 15"):
            list(stream)
