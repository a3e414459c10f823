import pytest
import torch

from specdec import theory


def test_overlap_is_one_minus_total_variation():
    p, q = torch.rand(7, 50, generator=torch.Generator().manual_seed(0)).double().chunk(2, -1)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    assert torch.allclose(theory.overlap(p, q), 1 - 0.5 * (p - q).abs().sum(-1))
    assert theory.overlap(p[0], q[0]).shape == () and theory.overlap(p.expand(2, *p.shape), q).shape == (2, 7)


def test_tokens_per_round_is_the_geometric_sum():
    for alpha in (0.0, 0.3, 0.8):
        for k in (1, 4, 9):
            assert theory.tokens_per_round(alpha, k) == pytest.approx((1 - alpha ** (k + 1)) / (1 - alpha))
    assert theory.tokens_per_round(1.0, 6) == 7
    assert theory.tokens_per_round([0.5, 0.5]) == pytest.approx(1.75)


def test_a_missing_position_is_refused():
    with pytest.raises(ValueError, match="cannot describe k = 3"):
        theory.tokens_per_round([0.5, 0.5], 3)
    with pytest.raises(ValueError, match="give k"):
        theory.tokens_per_round(0.5)


def test_a_round_costs_its_drafts_one_step_and_nothing_else_unless_it_is_said():
    assert theory.round_cost(4, 0.1) == pytest.approx(1.4)
    assert theory.round_cost(4, lambda k: 0.3 * k, lambda m: m, 0.5) == pytest.approx(1.2 + 5 + 0.5)


def test_published_upper_bounds():
    """The table of best reachable speed-ups with v = 1 and o = 0 that the field quotes."""
    for c, alpha, expected in ((0.02, 0.8, 3.82), (0.05, 0.8, 3.09), (0.10, 0.9, 3.43), (0.374, 0.8, 1.40)):
        k = theory.best_k(alpha, c, k_max=40)
        assert theory.speedup(alpha, k, c) == pytest.approx(expected, abs=0.01)


def test_best_k_is_the_best_and_the_smallest_of_equals():
    assert theory.best_k(0.8, 0.1) == max(range(1, 17), key=lambda k: theory.speedup(0.8, k, 0.1))
    assert theory.best_k(0.0, 0.0) == 1
    assert theory.best_k([0.9, 0.9, 0.0], 0.05, v=lambda m: 1 + 0.01 * m, o=0.02) == 2


def test_cost_of_a_text():
    assert theory.text_cost(0, [0.5], 1, 0.1) == 0
    assert theory.text_cost(1, [0.5], 4, 0.1, 1.0, 0.05) == pytest.approx(1.05)  # nothing to draft for one token
    # two tokens, k = 1: one round if the draft stays, else another one of a single token
    assert theory.text_cost(2, [0.7], 1, 0.1) == pytest.approx(1.1 + 0.3 * 1.0)
    assert theory.text_cost(3, [1.0, 1.0], 2, 0.1, lambda m: m) == pytest.approx(0.2 + 3)


def test_a_long_text_costs_what_its_rounds_cost():
    alphas = [0.8, 0.7, 0.6]
    per_token = theory.text_cost(4000, alphas, 3, 0.1, 1.2, 0.05) / 4000
    assert 1 / per_token == pytest.approx(theory.speedup(alphas, 3, 0.1, 1.2, 0.05), rel=2e-3)
