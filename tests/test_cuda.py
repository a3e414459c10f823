"""The kernels of native.cu against the plain Transformer and sampling.py: on a CPU by way of an emulator, and on a GPU if
there is one."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_model, needs_compiler

from specdec import cuda
from specdec.cuda import DRAFTS, MOST, CudaModel, cuda_probs, cuda_rule
from specdec.inference import trimmed
from specdec.sampling import RULES, Numbers, Randomness, Sampling

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SOURCE = "\n".join(f'#include "{path}"' for path in cuda.SOURCES) + f"""
extern "C" void launch(const char* kernel, int blocks, int cluster, int threads, int bytes, void** given) {{
  {" ".join(f"KERNEL(specdec_{name})" for name in cuda.ARGUMENTS)}
}}
"""
FLAGS = "-x c++ -std=c++20 -O1 -shared -fPIC -w -U_FORTIFY_SOURCE -DKEYS=20"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """What stands for `cuda.kernels` where there is no GPU."""
    folder, libraries = tmp_path_factory.mktemp("emulator"), {}
    header = Path(__file__).with_name("cuda_on_cpu.h")

    class Emulated:
        threads, cluster, keys = 64, 4, 20

        def __init__(self, blocks, clusters, most):
            if most not in libraries:
                path = folder / f"{most}.so"
                options = *FLAGS.split(), f"-DTHREADS={self.threads}", f"-DSHARED={most}"
                options += "-include", str(header)
                compiler = shutil.which("g++") or shutil.which("c++")
                subprocess.run([compiler, *options, "-", "-o", str(path)], input=SOURCE.encode(), check=True)
                libraries[most] = ctypes.CDLL(str(path))
            self.library, self.most = libraries[most], most
            self.blocks, self.clusters = blocks, clusters

        def launch(self, name, blocks, arguments, cluster):
            self.library.launch(f"specdec_{name}".encode(), blocks, cluster, self.threads, self.most, arguments)

    return Emulated


BLOCKS, CLUSTERS, MOST_SHARED = 3, 2, 224 << 10


@pytest.fixture(params=[
    pytest.param("cpu", marks=needs_compiler),
    pytest.param("cuda", marks=needs_gpu),
])  # fmt: skip
def device(request, monkeypatch):
    if request.param == "cpu":
        emulated = request.getfixturevalue("emulator")
        monkeypatch.setattr(cuda, "kernels", lambda device: emulated(BLOCKS, CLUSTERS, MOST_SHARED))
        cuda.call.cache_clear()
    yield torch.device(request.param)
    cuda.call.cache_clear()


def models(device, **shape):
    """A model with CUDA passes, and the same weights widened to float64."""
    model = make_model(**{"context": 40, "scale": 3.0} | shape).to(device, torch.bfloat16)
    return CudaModel(model), model.double()


def near(mine, theirs):
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-4)


SHAPES = [
    {}, {"n_kv_heads": 2}, {"width": 24, "n_heads": 4, "n_kv_heads": 1, "vocab_size": 13, "n_ids": 9},
    {"width": 40, "n_heads": 10, "n_kv_heads": 5, "vocab_size": 67}, {"activation": "relu2", "n_layers": 1, "vocab_size": 130},
    {"width": 136, "n_heads": 1, "n_layers": 1},
]  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_passes_are_the_same_passes(shape, device):
    """Every number of rows, a prompt longer than a pass, up to the last row of the context, rolled back and read again;
    whatever stands in the cache beyond the text."""
    fast, model = models(device, **shape)
    cache, other = model.new_cache(), fast.new_cache()
    other.k.fill_(torch.nan), other.v.fill_(torch.nan)
    ids = torch.randint(0, 5, (1, 40), generator=torch.Generator().manual_seed(2)).to(device)
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 24), (22, 40), (5, 12), (12, 28), (7, 13), (1, 11)):
        cache.truncate(start), other.truncate(start)
        near(fast(ids[:, start:end].int(), other), model(ids[:, start:end], cache))
        assert cache.length == other.length == end
        near(other.k[:, :, :, :end], cache.k[:, :, :, :end]), near(other.v[:, :, :, :end], cache.v[:, :, :, :end])
    with pytest.raises(ValueError, match="the cache holds 40 tokens"):
        fast(ids, other)
    asked = other, Sampling(), Randomness(0, device)
    calls = lambda: fast(ids[:, :0], other), lambda: fast.draw(ids[:, :0], *asked), lambda: fast.propose([], *asked, 2)
    for call in calls:
        with pytest.raises(ValueError, match="give at least one"):
            call()
    with pytest.raises(ValueError, match="2 texts were given to a model that reads one"):
        fast(ids[:, :1].repeat(2, 1), other)


@torch.inference_mode()
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_a_row_has_the_same_bits_in_any_company(blocks, device, monkeypatch):
    monkeypatch.setattr(f"{__name__}.BLOCKS", blocks)
    fast, model = models(device, width=32, n_heads=4, n_kv_heads=2, vocab_size=11)
    ids = torch.randint(0, 5, (1, 30), generator=torch.Generator().manual_seed(2)).to(device)
    alone, cache = fast.new_cache(), fast.new_cache()
    logits = torch.cat([fast(ids[:, i : i + 1], alone) for i in range(30)], 1)
    near(logits, model(ids))
    for rows in range(1, MOST + 1):
        cache.truncate(7 if rows > 1 else 0)
        start = cache.length
        assert torch.equal(fast(ids[:, start : start + rows + 7 * (rows == 1)], cache), logits[:, start : cache.length])
        assert torch.equal(cache.k[:, :, :, : cache.length], alone.k[:, :, :, : cache.length])
    cache.truncate(0)
    assert torch.equal(fast(ids, cache), logits)


WIDE = {"context": 40, "vocab_size": 90, "n_ids": 70, "width": 64, "n_heads": 4, "scale": 2.0}  # as draft.cu divides it
SAMPLINGS = [Sampling(), Sampling(0), Sampling(0.7), Sampling(1e-40), Sampling(0.7, top_k=4, top_p=0.9)]


@torch.inference_mode()
@pytest.mark.parametrize("offered", [None, [0, 2, 3, 7, 8, 11]], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_cuda_drafts_are_the_same_drafts(sampling, offered, device):
    """After a prompt, one token, several; tokens are fed back as ids of the whole vocabulary."""
    model = make_model(context=40, vocab_size=90, n_ids=70).to(device, torch.bfloat16)
    model = model if offered is None else trimmed(model, torch.tensor(offered, device=device))
    fast, model = CudaModel(model), model.double()
    cache, other = model.new_cache(), fast.new_cache()
    for seed, (rows, n) in enumerate(((20, 3), (1, 1), (1, 4), (2, 5), (3, 1))):
        ids = torch.randint(0, 5, (1, rows), generator=torch.Generator().manual_seed(rows)).to(device)
        numbers = Randomness(seed, device).uniforms(n)
        tokens, probs = fast.draw(ids, other, sampling, Numbers(numbers), n)
        assert tokens.shape == (n,) and probs.shape == (n, 70 if offered is None else 6)
        assert other.length == cache.length + rows + n - 1
        chance = Numbers(numbers)
        for token, row in zip(tokens, probs):
            theirs = sampling.probs_or_nan(model(ids, cache)[0, -1, : probs.shape[1]])
            near(row, theirs)
            assert token == chance.choose(theirs)
            ids = (token if offered is None else model.offered[token])[None, None]
        cut = cache.length - n % 2
        cache.truncate(cut), other.truncate(cut)


SOME = [0, 2, 3, 7, 8, 11, 12, 40, 41]


@torch.inference_mode()
@pytest.mark.parametrize("temperature, clusters, offered, shape", [
    (1.0, 1, SOME, {}),
    (1.0, 3, None, {"n_kv_heads": 2, "n_layers": 1}),
    (0.7, 2, None, {"n_heads": 6, "n_kv_heads": 3, "width": 96, "activation": "relu2"}),
    (0.0, 2, SOME, {"n_ids": 64}),
    (1e-40, 3, None, {}),
    (1.0, 2, None, {}),
    (1.0, 2, None, {"n_kv_heads": 1}),
])  # fmt: skip
def test_clusters_draft_the_same(temperature, clusters, offered, shape, device, monkeypatch):
    """Of the whole vocabulary, whatever stands in the cache beyond the text; up to the end of the context."""
    monkeypatch.setattr(f"{__name__}.CLUSTERS", clusters)
    sampling, generator = Sampling(temperature), torch.Generator().manual_seed(5)
    model = make_model(**WIDE | shape).to(device, torch.bfloat16)
    model = model if offered is None else trimmed(model, torch.tensor(offered, device=device))
    fast, model = CudaModel(model), model.double()
    cache, other = model.new_cache(), fast.new_cache()
    other.k.fill_(torch.nan), other.v.fill_(torch.nan)
    n_ids, seen = model.config.n_ids, set()
    for seed, (rows, n, kept) in enumerate(((1, 3, 2), (20, 1, 20), (2, 7, 25), (2, 14, 0), (1, 2, 0))):
        ids = torch.randint(0, 5, (1, rows), generator=generator)
        numbers = Randomness(seed, device).uniforms(n)
        tokens, probs = fast.propose(ids[0].tolist(), other, sampling, Numbers(numbers), n)
        assert tokens.shape == (n,) and probs.shape == (n, n_ids) and other.length == cache.length + rows + n - 1
        chance, ids = Numbers(numbers), ids.to(device)
        for token, row in zip(tokens, probs):
            theirs = sampling.probs_or_nan(model(ids, cache)[0, -1, : n_ids if offered is None else len(offered)])
            choice = chance.choose(theirs)
            if offered is not None:
                theirs, choice = theirs.new_zeros(n_ids).index_copy(0, model.offered, theirs), model.offered[choice]
            near(row, theirs)
            assert token == choice
            ids = token[None, None]
            seen.add(int(token))
        near(other.k[:, :, :, : cache.length], cache.k[:, :, :, : cache.length])
        cache.truncate(kept), other.truncate(kept)
    assert len(seen) > 1


@torch.inference_mode()
def test_what_clusters_do_not_draft(device):
    """Models that are too large or not to be divided, and samplings with filters, are drafted from in the other way."""
    ids, asked = [1], (Sampling(), Randomness(0, device), 2)
    shapes = {"context": 8000}, {"n_heads": 6, "width": 96}, {"n_heads": 1, "width": 80}, {"n_layers": 9, "width": 256}
    for shape in shapes:
        fast = CudaModel(make_model(**WIDE | shape).to(device, torch.bfloat16))
        assert fast.draft is None, shape
        tokens, probs = fast.propose(ids, fast.new_cache(), *asked)
        assert tokens.shape == (2,) and probs.shape == (2, fast.config.n_ids), shape
    fits = make_model(**WIDE).to(device, torch.bfloat16)
    assert CudaModel(trimmed(fits, torch.tensor([3, 1], device=device))).draft is None  # ids that are in no order
    fast = CudaModel(fits)
    assert (fast.propose(ids, fast.new_cache(), Sampling(top_k=2), *asked[1:])[1] > 0).sum(-1).tolist() == [2, 2]
    fits.head.weight.data[0, 0] = torch.nan
    fast = CudaModel(fits)
    tokens, probs = fast.propose(ids, fast.new_cache(), *asked)
    assert tokens.tolist() == [70, 70] and probs.isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_that_is_not_finite_draws_no_token(sampling, value, device):
    model = make_model().to(device, torch.bfloat16)
    model.head.weight.data[0, 0] = value
    fast = CudaModel(model)
    tokens, probs = fast.draw(torch.tensor([[1, 2]], device=device), fast.new_cache(), sampling, Randomness(0, device), 3)
    assert tokens.tolist() == [5, 5, 5] and probs.isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("shared", [224 << 10, 2048])
def test_cuda_sampling_is_the_same_sampling(sampling, shared, device, monkeypatch):
    """Of rows that fit into shared memory, and of rows that do not."""
    monkeypatch.setattr(f"{__name__}.MOST_SHARED", shared)
    wide = 4 * torch.randn(6, 801, generator=torch.Generator().manual_seed(0)).to(device)
    wide[3, [500, 52, 20, 700]] = 30  # the first of the greatest
    for rows in (wide, wide[:1], wide[:, :5], wide[:0]):
        near(cuda_probs(rows, sampling), sampling.probs_or_nan(rows))
    wide[1, 3], wide[2, 700] = torch.nan, -torch.inf
    assert cuda_probs(wide, sampling).isnan().all(-1).tolist() == [False, True, True, False, False, False]


@torch.inference_mode()
@pytest.mark.parametrize("n, shared", [(5, 224 << 10), (300, 224 << 10), (300, 1024)])
@pytest.mark.parametrize("rule", RULES)
def test_a_cuda_rule_decides_the_same(rule, n, shared, device, monkeypatch):
    """Refusals at every position, full acceptance, a draft equal to the target, one-hot rows, a row of NaN."""
    monkeypatch.setattr(f"{__name__}.MOST_SHARED", shared)
    rule, generator, seen = RULES[rule], torch.Generator().manual_seed(1), set()
    for k in (0, 1, 2, 3, 4, 6, 7, 8, 5, 5, 5, DRAFTS, DRAFTS + 1):
        p, q = (torch.randn(m, n, generator=generator).softmax(-1) for m in (k + 1, k))
        one = torch.nn.functional.one_hot(torch.randint(0, n, (k + 1,), generator=generator), n).float()
        drafted = torch.randint(0, n, (k,), generator=generator)
        near_p = (p[:k] + 0.1 * q) / 1.1
        broken = p.index_fill(0, torch.tensor([k // 2]), torch.nan)
        for rows in ((q, p), (near_p, p), (p[:k], p), (one[:k], p), (q, one), (q, broken)):
            drafts = rows[0].argmax(-1) if rows[0] is not q else drafted
            for seed in range(4):
                numbers = Randomness(seed).uniforms(k + 1)
                theirs = [int(x) for x in rule(drafts, *rows, Numbers(numbers))]
                given = [x.to(device) for x in (drafts, *rows)]
                mine = cuda_rule(rule, *given, Numbers(numbers.to(device)))
                assert [int(x) for x in mine] == theirs and mine[1].shape == (1,)
                seen.add((k, theirs[0]))
    assert len({accepted for k, accepted in seen if k == 5}) > 3


@pytest.mark.parametrize("rule", RULES)
def test_whoever_chooses_is_asked(rule, device):
    class First(Randomness):
        def choose(self, probs):
            return probs.argmax(-1, keepdim=True)

    p, q = torch.eye(5, device=device)[None, 3].repeat(2, 1) * 0.4 + 0.12, torch.eye(5, device=device)[None, 1]
    for seed in range(9):
        assert int(cuda_rule(RULES[rule], torch.tensor([1], device=device), q, p, First(seed, device))[1]) == 3


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_what_has_no_probability_is_never_chosen(number, device):
    p = torch.zeros(2, 300, device=device)
    p[:, [70, 71, 200, 201]] = 0.25
    q = torch.nn.functional.one_hot(torch.tensor([70]), 300).float().to(device)
    numbers = torch.tensor([0.9, number], dtype=torch.float64, device=device)  # the draft is refused
    given = torch.tensor([70], device=device), q, p
    for rule in RULES.values():
        theirs, mine = rule(*given, Numbers(numbers)), cuda_rule(rule, *given, Numbers(numbers))
        assert [x.tolist() for x in mine] == [x.tolist() for x in theirs] and int(mine[1]) in (71, 200, 201)


def test_models_that_cuda_passes_do_not_know(device):
    with pytest.raises(ValueError, match="choose bfloat16, or graphs"):
        CudaModel(make_model().to(device))
    for shape in ({"width": 20, "n_heads": 2}, {"width": 1024}, {"n_layers": 65}):
        with pytest.raises(ValueError, match="choose graphs"):
            CudaModel(make_model(**shape).to(device, torch.bfloat16))
