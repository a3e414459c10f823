import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.inference import PackedLinear, ready
from specdec.model import KVCache, ModelConfig, Transformer, rotate, rotary_tables
from specdec.profiles import PROFILES
from specdec.train import has_bf16


@pytest.mark.parametrize(("role", "millions"), [("target", 151.6), ("small", 27.1), ("medium", 68.0)])
def test_the_seeds_sizes(role, millions):
    with torch.device("meta"):
        model = Transformer(PROFILES["seed"].models[role])
    assert model.n_params() / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_mha_variant_of_the_target():
    with torch.device("meta"):
        model = Transformer(ModelConfig(12, 12, 768, 12))
    assert model.n_params() / 1e6 == pytest.approx(162.2, abs=0.05)


def test_profiles_keep_the_seeds_shape():
    for profile in PROFILES.values():
        target, small, medium = (profile.models[r] for r in ("target", "small", "medium"))
        assert small.n_layers < medium.n_layers < target.n_layers
        assert {m.n_ids for m in profile.models.values()} == {target.n_ids}
    seed = PROFILES["seed"].schedules["target"]
    assert [p.iterations for p in seed.phases] == [10_000, 30_000, 50_000, 40_000]
    assert seed.tokens == (40_000 * 32 * 8 + 90_000 * 16 * 16) * 1024


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([(2, 1), (2, 2), (4, 2)]))
@settings(max_examples=15, deadline=None)
def test_reading_in_portions_equals_reading_at_once(portions, heads):
    model = make_model(2, 16, 3, context=32, n_heads=heads[0], n_kv_heads=heads[1])
    ids = torch.randint(5, (2, sum(portions)), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(batch=2)
    with torch.no_grad():
        parts = torch.cat([model(part, cache) for part in ids.split(portions, 1)], 1)
        assert torch.allclose(parts, model(ids), atol=1e-12)
    assert cache.length == sum(portions)


@given(kept=st.integers(1, 8), wrong=st.integers(1, 6), more=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_after_a_rollback_the_cache_is_a_fresh_prefill(kept, wrong, more):
    model = make_model(2, 16, 4, context=32)
    text = torch.randint(5, (1, 8 + more), generator=torch.Generator().manual_seed(1))
    cache, fresh = model.new_cache(), model.new_cache()
    with torch.no_grad():
        model(text[:, :8], cache)
        model(torch.randint(5, (1, wrong), generator=torch.Generator().manual_seed(2)), cache)
        cache.truncate(kept)
        a = model(text[:, kept:], cache)
        b = model(text, fresh)
    n = cache.length
    assert n == fresh.length == 8 + more
    assert torch.allclose(cache.k[..., :n, :], fresh.k[..., :n, :], atol=1e-12)
    assert torch.allclose(cache.v[..., :n, :], fresh.v[..., :n, :], atol=1e-12)
    assert torch.allclose(a, b[:, kept:], atol=1e-12)


def test_truncating_copies_nothing_and_never_grows():
    cache = KVCache(ModelConfig(1, 1, 4, 1, vocab_size=4, n_ids=4, context=8))
    cache.append(5)
    before = cache.k.data_ptr(), cache.k._version
    cache.truncate(2)
    cache.truncate(7)
    assert cache.length == 2 and (cache.k.data_ptr(), cache.k._version) == before
    with pytest.raises(ValueError, match="do not fit"):
        cache.append(7)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(-1)
    assert cache.length == 2


def test_both_norms_of_a_block_matter():
    """The published attempt applies one norm twice and the other never."""
    model = make_model(1, 16, 5)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(ids)
        for name in ("attention_norm", "mlp_norm"):
            norm = getattr(model.blocks[0], name)
            norm.weight[0] *= 3
            assert (model(ids) - plain).abs().max() > 1e-6, name
            norm.weight[0] /= 3


def test_rotary_depends_on_the_distance_only():
    cos, sin = rotary_tables(32, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(m, n):
        return (rotate(q, cos[m : m + 1], sin[m : m + 1]) * rotate(k, cos[n : n + 1], sin[n : n + 1])).sum()

    assert torch.allclose(product(5, 2), product(25, 22), atol=1e-5)
    assert not torch.allclose(product(5, 2), product(5, 4), atol=1e-3)


def test_the_future_is_not_seen():
    model = make_model(2, 16, 6)
    ids = torch.tensor([[1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 3, 0]])
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :3], model(other)[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 30}, "does not split"), ({"n_kv_heads": 3}, "evenly"), ({"n_ids": 0}, "n_ids"),
     ({"activation": "swish"}, "activation")],
)  # fmt: skip
def test_impossible_shapes_are_refused(change, message):
    good = dict(n_layers=1, n_heads=4, width=32, n_kv_heads=2, vocab_size=8, n_ids=8)
    with pytest.raises(ValueError, match=message):
        ModelConfig(**good | change)


def test_too_long_and_empty_texts_are_refused():
    model = make_model(1, 8, 0, context=4)
    with pytest.raises(ValueError, match="exceed the context"):
        model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="no tokens"):
        model(torch.zeros(1, 0, dtype=torch.long))


def test_a_cleared_cache_is_as_new():
    model = make_model(1, 8, 0)
    cache = model.new_cache()
    model(torch.tensor([[1, 2]]), cache)
    at = cache.k.data_ptr()
    cache.clear()
    assert cache.length == 0 and not cache.k.any() and not cache.v.any() and cache.k.data_ptr() == at


@pytest.mark.skipif(not has_bf16(), reason="this machine does not multiply bfloat16")
def test_packing_changes_no_bit():
    model = Transformer(ModelConfig(2, 4, 64, 2, vocab_size=128, n_ids=128, context=32), torch.Generator().manual_seed(0))
    plain, packed = model.eval().bfloat16(), ready(model)
    assert isinstance(packed.head, PackedLinear)
    with torch.inference_mode():
        for n in (1, 2, 5, 9):
            ids = torch.randint(128, (1, n), generator=torch.Generator().manual_seed(n))
            assert torch.equal(plain(ids, plain.new_cache()), packed(ids, packed.new_cache()))


@torch.inference_mode()
def test_packing_float32_changes_rounding_only():
    config = ModelConfig(2, 4, 64, 2, vocab_size=128, n_ids=128, context=32)
    plain = Transformer(config, torch.Generator().manual_seed(0)).eval()
    packed = ready(plain, "float32")
    assert isinstance(packed.head, PackedLinear) == torch.backends.mkldnn.is_available()
    for n in (1, 2, 5, 9):
        ids = torch.randint(128, (1, n), generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(packed(ids, packed.new_cache()), plain(ids, plain.new_cache()))


def test_ready_leaves_the_model_alone():
    model = make_model(1, 8, 0)
    fast = ready(model, "float32")
    assert model.dtype == torch.float64 and fast.dtype == torch.float32 and not fast.training
