"""The soak, for two seconds."""

import soak
from conftest import EXACT


def test_a_short_soak_finds_nothing(proof):
    said = []
    figures = soak.soak(2.0, seed=1, n=1000, say=said.append)
    assert not figures["failures"] and figures["laws"] and figures["draws"] and figures["mistakes tried"]
    assert figures["mistakes rejected"] == figures["mistakes tried"]
    assert "largest total variation" in said[0] and "false alarm" in said[1] and len(said) == 2
    largest, n = figures["largest total variation"], figures["texts enumerated"]
    proof.check("a soak of two seconds", "total variation of joint laws", largest, EXACT, n)


def test_a_soak_notices_a_wrong_rule(monkeypatch):
    def always_accept(drafted, q, p, randomness):
        return len(drafted), randomness.choose(p[-1])

    monkeypatch.setattr(soak, "RULES", {"token-wise": always_accept})
    figures = soak.soak(0.0, seed=2, n=1000, say=lambda text: None)
    assert len(figures["failures"]) >= 1 and "seed 2, round" in figures["failures"][0]
