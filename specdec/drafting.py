"""Who proposes: anything that offers k tokens and the distributions they were drawn from.

A drafter keeps whatever state it likes about the text so far and forgets the end of it when told to. The engine never
asks how the tokens were found, so a new idea is a new class here and nothing else.
"""

import math
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .data import TokenData
from .inference import Model, Whole, draw_next
from .passes import Captured, FixedShapes
from .sampling import Numbers, Randomness, Sampling, as_written, spread


class Draft(NamedTuple):
    """Tokens (n,) with 0 ≤ n ≤ k, and the rows q (n, V) that they were really drawn from."""

    tokens: Tensor
    probs: Tensor


class Drafter(Protocol):
    """The whole contract. A decision to draft no further may depend on q and on what was drawn, but whatever was drawn is
    proposed: dropping a drawn token changes the law of what is left. A drafter knows one text at a time; to begin another before
    one has ended takes another drafter."""

    n_ids: int  # size V of the rows of q; must equal the target's
    context: int | None  # longest text it can read, drafted tokens included; None has no limit

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
    """A small Transformer as the drafter, with a cache of its own.

    A model with a trimmed output layer (`inference.trimmed`) offers N ids only; q is zero on all others.
    """

    def __init__(self, model: Model):
        self.model, self.ids = model, model.offered
        self.n_ids, self.context = model.config.n_ids, model.config.context
        self.cache = model.new_cache()

    def start(self) -> None:
        if isinstance(self.model, FixedShapes):  # which reads all rows of its cache
            self.cache = self.model.new_cache()
        self.cache.truncate(0)

    def unread(self, text: list[int]) -> list[int]:
        """The end of ``text`` that the cache lacks: usually one token. After a round in which every draft was accepted it is
        two: the last draft was drawn but never read. Reading all that is missing, whatever it is, leaves no hole."""
        if self.cache.length >= len(text):
            raise ValueError("another text was begun with this drafter, which knows one at a time; give each text its own.")
        return text[self.cache.length :]

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        if k == 0:
            return no_draft(self.n_ids, self.model.device)
        tokens, rows = [], []
        unread = torch.tensor([self.unread(text)], device=self.model.device)  # (1, 1 or 2)
        while len(tokens) < k and self.goes_on(rows):
            token, q = self.offered(*draw_next(self.model, unread, self.cache, sampling, randomness, "draft model"))
            tokens.append(token)
            rows.append(q)
            unread = token[None]  # (1, 1)
        return Draft(torch.cat(tokens), spread(torch.cat(rows), self.ids, self.n_ids))

    def goes_on(self, rows: list[Tensor]) -> bool:
        """Whether to draft one more token after those drawn from ``rows``."""
        return True

    def offered(self, token: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The ids (n,) of tokens drawn from the rows q, (n, V) or with a trimmed output layer (n, N)."""
        token = token.clamp(max=q.shape[-1] - 1)  # a row of NaN offers the id after the last; the engine sees it itself
        return token if self.ids is None else self.ids[token], q

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


class AdaptiveDraftModel(DraftModel):
    """Drafts on while it is sure of itself: until the product of the largest probabilities of its rows q falls below
    ``least``. What was drawn stays, so nothing is lost. At temperature 0 q is one-hot, as sure as can be, and it never stops."""

    def __init__(self, model: Model, *, least: float = 0.3):
        super().__init__(model)
        if not 0 <= least <= 1:
            raise ValueError(f"least is {least}; give a probability, 0 to draft k tokens always and 1 for a single one.")
        self.least = least

    def goes_on(self, rows: list[Tensor]) -> bool:
        return math.prod(float(q.amax()) for q in rows) >= self.least


class ChainedDraftModel(DraftModel):
    """The same on compiled passes, with all k steps of a round as one call: between them nothing waits for Python."""

    model: Whole

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        if k == 0 or not as_written(randomness):
            return super().propose(text, k, sampling, randomness)
        return Draft(*self.model.propose(self.unread(text), self.cache, sampling, randomness, k))


def drafter_of(model: Model) -> DraftModel:
    """The fastest drafter that a model made ready allows."""
    return (ChainedDraftModel if isinstance(model, Whole) else DraftModel)(model)


class CapturedDraftModel(DraftModel):
    """The same, with all k steps of a round as one CUDA graph, one for each k: between two drafts nothing waits for Python.

    Its shapes are fixed, so a round always begins by reading the last two tokens, of which one is usually known. The last
    rounds of a text, which may use fewer tokens, draft as many as those before and cut off the rest, whatever it is: to
    capture another graph for one of them would take longer than the text.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        self.graphs: dict[tuple[Sampling, int], Captured] = {}
        self.longest = 0  # most tokens that a round of this text was asked for

    def start(self) -> None:
        super().start()
        self.cache.clear()
        self.longest = 0

    def propose(self, text: list[int], k: int, sampling: Sampling, randomness: Randomness) -> Draft:
        if k == 0 or not as_written(randomness):
            return super().propose(text, k, sampling, randomness)
        device, unread = self.model.device, self.unread(text)
        if len(unread) > 2:
            self.model(torch.tensor([unread[:-2]], device=device), self.cache)
        last = torch.tensor([text[-2:] if len(text) > 1 else text * 2], device=device)  # (1, 2)
        positions = torch.tensor([max(0, len(text) - 2), len(text) - 1], device=device)
        self.longest = max(self.longest, k)
        width = k if (sampling, k) in self.graphs else self.longest
        numbers = torch.zeros(width, dtype=torch.float64, device=device)
        numbers[:k] = randomness.uniforms(k)
        if (sampling, width) not in self.graphs:
            self.graphs[sampling, width] = Captured(partial(self.chain, sampling), last, positions, numbers)
        tokens, rows = self.graphs[sampling, width](last, positions, numbers)
        self.cache.length = len(text) + k - 1
        return Draft(tokens[:k].clone(), spread(rows[:k], self.ids, self.n_ids).clone())

    def chain(self, sampling: Sampling, unread: Tensor, positions: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) and rows (n, V or N) for n uniform numbers, after reading ``unread`` (1, 2) at ``positions``."""
        chance, tokens, rows = Numbers(numbers), [], []
        for _ in numbers:
            logits = self.model.forward_at(unread, positions, self.cache.k, self.cache.v)[0, -1]
            token, q = self.offered(*sampling.draw(logits[: self.n_ids], chance, "draft model"))
            tokens.append(token)
            rows.append(q)
            unread, positions = token[None], (positions[-1:] + 1).clamp(max=self.context - 1)
        return torch.cat(tokens), torch.stack(rows)


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


def frequent_ids(data: TokenData, n: int) -> Tensor:
    """The n ids that the training text uses most, in ascending order: what a trimmed output layer keeps."""
    if not 0 < n <= data.tokenizer.n_vocab:
        raise ValueError(f"{n} ids cannot be kept of {data.tokenizer.n_vocab}; give 1 to all of them.")
    counts = np.bincount(data.train, minlength=data.tokenizer.n_vocab)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:n]))
