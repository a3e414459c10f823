"""Sampling and rule as programs: the same rows, the same decisions. Apart from test_inference.py, beside which they run."""

import pytest
import torch
from conftest import needs_compiler

from specdec.inference import ready_rule, ready_sampling
from specdec.sampling import RULES, Randomness, Sampling, token_wise

SAMPLINGS = [Sampling(), Sampling(0), Sampling(0.7, top_k=4, top_p=0.9)]


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_compiled_sampling_is_the_same_sampling(sampling):
    fast = ready_sampling(sampling, "compiled")
    wide = 4 * torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = wide[:, :5].contiguous()
    for rows in (logits, logits[:2], logits[:1], wide[:, :5], logits[0]):  # several, few, one, a view, one as it is
        torch.testing.assert_close(fast.probs(rows), sampling.probs(rows))
    logits[1, 3] = torch.nan
    assert fast.probs(logits).isnan().all(-1).tolist() == [False, True] + 4 * [False]


@needs_compiler
@torch.inference_mode()
def test_a_compiled_rule_decides_the_same():
    fast, generator = ready_rule(token_wise, "compiled"), torch.Generator().manual_seed(1)
    for k in (0, 1, 2, 5, 2, 8):
        p, q = (torch.randn(n, 5, dtype=torch.float64, generator=generator).softmax(-1) for n in (k + 1, k))
        drafted = torch.randint(0, 5, (k,), generator=generator)
        for seed in range(20):
            mine, plain = (rule(drafted, q, p, Randomness(seed)) for rule in (fast, token_wise))
            assert [x.tolist() for x in mine] == [x.tolist() for x in plain]
    assert ready_rule(RULES["block"], "compiled") is RULES["block"]
