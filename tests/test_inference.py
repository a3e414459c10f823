"""Every fast path against the plain one: fixed shapes, captured drafts, trimmed output layers, exact passes."""

import copy

import pytest
import torch
from conftest import make_model, needs_compiler
from torch import nn

from specdec.compiled import CompiledShapes, Work, stream
from specdec.drafting import AdaptiveDraftModel, CapturedDraftModel, ChainedDraftModel, DraftModel, fewest, frequent_ids
from specdec.engine import Trace, generate, speculate
from specdec.inference import PASSES, compile_ahead, draw_next, ready, ready_rule, ready_sampling, trimmed
from specdec.model import Transformer
from specdec.passes import EXACT_ROWS, Captured, FixedShapes
from specdec.products import MOST, PanelLinear
from specdec.profiles import get_profile
from specdec.programs import program_path
from specdec.sampling import RULES, Randomness, Sampling, token_wise


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


def test_panels_of_other_types_are_refused():
    with pytest.raises(ValueError, match="of float32 or float64"):
        PanelLinear(nn.Linear(8, 8, bias=False, dtype=torch.float16))


@needs_compiler
@torch.inference_mode()
def test_a_model_made_ready_is_the_same_model():
    """A prompt, which oneDNN multiplies, then a few tokens at a time."""
    model = Transformer(get_profile("ci").models["target"], torch.Generator().manual_seed(0)).eval()
    fast = ready(model, "float32")
    cache, other = model.new_cache(), fast.new_cache()
    for ids in torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(2)).split([30, 1, 2, 9, 17, 1], 1):
        torch.testing.assert_close(fast(ids, other), model(ids, cache))


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2}, {"n_heads": 4, "n_kv_heads": 1}])
def test_a_model_written_for_the_compiler_is_the_same_model(shape, dtype):
    """One token and several, of types with panels and of those left with sums; what stands in the cache beyond the text
    does not matter."""
    model = make_model(context=32, **shape).to(dtype)
    near = {} if dtype == torch.float64 else {"atol": 8 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}
    short = stream(copy.deepcopy(model))
    cache, other = model.new_cache(), model.new_cache()
    other.k.normal_(), other.v.normal_()
    ids = torch.randint(0, 5, (1, 14), generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 9), (9, 10), (10, 12), (12, 13), (13, 14)):
        logits = model(ids[:, start:end], cache)
        torch.testing.assert_close(short.forward_at(ids[:, start:end], torch.arange(start, end), other.k, other.v), logits, **near)
    torch.testing.assert_close(other.k[..., :14, :], cache.k[..., :14, :], **near)


TWO_PROGRAMS = {"context": 130, "n_layers": 1, "n_kv_heads": 2}  # of one size, so that tests share what they compile


@needs_compiler
@torch.inference_mode()
def test_compiled_passes_are_the_same_passes():
    model = make_model(**TWO_PROGRAMS)
    plain, fast = ready(model, torch.float64), ready(model, torch.float64, "compiled")
    assert isinstance(fast, CompiledShapes) and len(fast.sizes) < max(fast.sizes)
    fast.sizes = (2, 12)
    works = [Work(rows) for rows in fast.sizes]
    compile_ahead({fast: [*works, Work(7)]})
    assert not program_path(*fast.key(Work(7))).exists()  # of this size the model has none
    assert all(program_path(*fast.key(work)).exists() for work in works)
    cache, other = plain.new_cache(), fast.new_cache()
    ids = torch.randint(0, 5, (1, 130), generator=torch.Generator().manual_seed(2))
    # a long prompt, one token twice, that runs as two, four that run as twelve and over a cut, more of the text, its end
    for start, end in ((0, 60), (60, 61), (61, 62), (62, 66), (66, 126), (126, 130)):
        torch.testing.assert_close(fast(ids[:, start:end], other), plain(ids[:, start:end], cache))
        other.truncate(end - 1), cache.truncate(end - 1)  # rolled back and read again
        torch.testing.assert_close(fast(ids[:, end - 1 : end], other), plain(ids[:, end - 1 : end], cache))


SAMPLINGS = [Sampling(), Sampling(0), Sampling(0.7, top_k=4, top_p=0.9)]


@needs_compiler
def test_no_pass_is_longer_than_the_context():
    assert ready(make_model(context=8), torch.float64, "compiled").sizes == (3, 6)
    assert ready(make_model(context=32), torch.float64, "compiled").sizes == (3, 6, 9, 32)


@needs_compiler
@torch.inference_mode()
def test_compiled_steps_draw_the_same_tokens():
    """A prompt, one token, two, every temperature in one program."""
    model = make_model(**TWO_PROGRAMS)
    plain, fast = ready(model, torch.float64), ready(model, torch.float64, "compiled")
    samplings = [Sampling(), Sampling(0), Sampling(0.3), Sampling(1e-40)]
    for sampling in samplings:
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
    assert set(fast.programs) == {Work(1, 1), Work(2, 1)}
    model.head.weight.data[0, 0] = torch.nan
    broken = ready(model, torch.float64, "compiled")
    with pytest.raises(ValueError, match="the target produced a logit that is not finite"):
        list(generate(broken, [1], max_new_tokens=2))
    with pytest.raises(ValueError, match="the draft model produced a logit that is not finite"):
        list(speculate(fast, [1], drafter=DraftModel(broken), k=2, max_new_tokens=5))


@needs_compiler
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_compiled_text_is_the_same_text(sampling):
    target, draft = (make_model(seed=seed, **TWO_PROGRAMS) for seed in (1, 2))
    fast, drafts = (ready(model, torch.float64, "compiled") for model in (target, draft))
    fast.sizes = (2, 12)
    options = {"rule": ready_rule(token_wise, "compiled"), "sampling": ready_sampling(sampling, "compiled")}
    plain = texts(target, DraftModel(draft), sampling=sampling)
    assert texts(fast, DraftModel(drafts), **options) == plain
    assert texts(fast, ChainedDraftModel(drafts), **options) == plain
    own, plain = (
        list(generate(model, [1], max_new_tokens=12, sampling=s, randomness=Randomness(3)))
        for model, s in ((fast, options["sampling"]), (target, sampling))
    )
    assert own == plain


@needs_compiler
@torch.inference_mode()
def test_chained_drafts_are_the_same_drafts():
    """Long proposals in programs of three steps and of one, of a trimmed draft, from a text of one token and from longer
    ones; and no round reads more than it must."""
    ids = torch.tensor([0, 2, 3, 4])
    target, draft = (make_model(seed=seed, **TWO_PROGRAMS) for seed in (1, 2))
    plain = DraftModel(trimmed(draft, ids))
    chained = ChainedDraftModel(ready(trimmed(draft, ids), torch.float64, "compiled"))
    assert chained.chains == (5, 4, 1)
    chained.chains, chained.model.sizes = (3, 1), (12,)  # what takes less compiling
    for k in (1, 3, 7):
        for prompt in ([1], [1, 0], [1, 0, 2, 4], [1, 0, 2, 4] * 3 + [2]):
            assert texts(target, chained, k=k, n=14, prompt=prompt) == texts(target, plain, k=k, n=14, prompt=prompt)
    read, model, trace = [], chained.model.model, Trace()
    chained.model.model = lambda ids, cache: read.append(ids.shape[1]) or model(ids, cache)
    list(speculate(draft, [1, 0, 2, 4], drafter=chained, k=5, max_new_tokens=40, randomness=Randomness(0), trace=trace))
    assert any(r.accepted == 5 for r in trace.rounds) and read == [2]  # of the prompt; all else is in the programs


def test_a_proposal_takes_as_few_programs_as_there_can_be():
    assert [fewest(k, (5, 4, 1)) for k in (0, 1, 3, 5, 8, 9)] == [(), (1,), (1, 1, 1), (5,), (4, 4), (5, 4)]
    assert fewest(2, (1,)) == (1, 1)


def test_compiled_passes_are_for_the_cpu():
    with pytest.raises(ValueError, match="choose graphs on a GPU"):
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


def test_captured_drafts_grow_with_k(pair):
    target, draft = pair
    drafter = CapturedDraftModel(draft)
    for k in (2, 4, 1):
        assert texts(target, drafter, k=k) == texts(target, DraftModel(draft), k=k)


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
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_logits_do_not_depend_on_the_company(self, model, dtype):
        exact = ready(model, dtype, exact=True)
        ids = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(2))
        cache = exact.new_cache()
        one_by_one = torch.cat([exact(ids[:, i : i + 1], cache) for i in range(60)], 1)
        cache.truncate(0)
        blocks = torch.cat([exact(block, cache) for block in ids.split(7, 1)], 1)
        assert torch.equal(one_by_one, blocks)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_greedy_text_is_the_target_s_own_token_for_token(self, model, dtype):
        exact = ready(model, dtype, exact=True)
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
