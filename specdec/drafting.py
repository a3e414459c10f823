"""Who proposes: anything that offers k tokens and the distributions they were drawn from.

A drafter keeps whatever state it likes about the text so far and forgets the end of it when told to. The engine never
asks how the tokens were found, so a new idea is a new class here and nothing else.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .model import Transformer
from .sampling import Randomness, Sampling


class Draft(NamedTuple):
    """Tokens (n,) with 0 ≤ n ≤ k, and the rows q (n, V) that they were really drawn from."""

    tokens: Tensor
    probs: Tensor


class Drafter(Protocol):
    """The whole contract. A decision to propose fewer than k tokens may depend on q, never on a token drawn from it:
    dropping a drawn token changes the law of what is left."""

    n_ids: int  # size V of the rows of q; must equal the target's
    context: int | None  # longest text it can read; None has no limit

    def start(self) -> None:
        """Forget everything; a new text begins."""

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        """Continue ``text``, whose last tokens the drafter has not read yet, by at most k tokens."""

    def truncate(self, length: int) -> None:
        """Only the first ``length`` tokens of what was read, drafted ones included, are still true."""


def no_draft(n_ids: int, device: str | torch.device) -> Draft:
    """The proposal of no token at all; the round is then a plain step of the target."""
    return Draft(torch.empty(0, dtype=torch.long, device=device), torch.empty(0, n_ids, device=device))


class DraftModel:
    """A small Transformer as the drafter, with a cache of its own."""

    def __init__(self, model: Transformer):
        self.model = model
        self.n_ids, self.context = model.config.n_ids, model.config.context
        self.cache = model.new_cache()

    def start(self) -> None:
        self.cache.truncate(0)

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        tokens, rows = [], []
        # Usually one token is unread. After a round in which every draft was accepted it is two: the last draft was
        # drawn but never read. Reading all that is missing, whatever it is, leaves no hole in the cache.
        unread = torch.tensor([text[self.cache.length :]], device=self.model.device)  # (1, 1 or 2)
        for _ in range(k):
            logits = self.model(unread, self.cache)[0, -1, : self.n_ids]  # (V,)
            q = sampling.probs(logits, "draft model")
            token = randomness.choose(q)  # (1,)
            tokens.append(token)
            rows.append(q)
            unread = token[None]  # (1, 1)
        if not tokens:
            return no_draft(self.n_ids, self.model.device)
        return Draft(torch.cat(tokens), torch.stack(rows))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


class PromptLookup:
    """Copies what followed the last earlier occurrence of the text's ending: no model, c ≈ 0 (Saxena 2023).

    ``longest`` to ``shortest`` tokens of the ending are looked for, longest first. q is one-hot: the proposal is
    certain of itself, and the rule accepts it with probability p(x).
    """

    context = None

    def __init__(self, n_ids: int, longest: int = 3, shortest: int = 1, device: str | torch.device = "cpu"):
        if not 1 <= shortest <= longest:
            raise ValueError(f"an ending of {shortest} to {longest} tokens cannot be looked up; give 1 ≤ shortest ≤ longest.")
        self.n_ids, self.longest, self.shortest, self.device = n_ids, longest, shortest, device

    def start(self) -> None:
        pass

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        found = self._continuation(text, k)
        tokens = torch.tensor(found, dtype=torch.long, device=self.device)
        return Draft(tokens, torch.nn.functional.one_hot(tokens, self.n_ids).to(torch.float32))

    def _continuation(self, text: list[int], k: int) -> list[int]:
        for n in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            ending = text[-n:]
            for start in range(len(text) - n - 1, -1, -1):
                if text[start : start + n] == ending:
                    return text[start + n : start + n + k]
        return []

    def truncate(self, length: int) -> None:
        pass
