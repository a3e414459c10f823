"""The engine: text from the target alone, and the same text, in law, from a draft that the target verifies.

`speculate` is the whole of speculative decoding in four commented steps (Leviathan et al. 2023, 2211.17192). What
happened is written into a `Trace`; statistics are computed from it elsewhere, never inside the loop.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from .drafting import Drafter
from .inference import draw_next, next_probs, read
from .model import Transformer
from .sampling import Randomness, Rule, Sampling, not_finite, token_wise


class Round(NamedTuple):
    """One draft-verify-decide round."""

    start: int  # length of the text when the round began
    drafted: list[int]
    accepted: int  # how many of them the target kept
    emitted: list[int]  # accepted tokens and the target's own one, cut at a stop token
    target_probs: Tensor | None = None  # (k+1, V), kept when the trace asks for it
    draft_probs: Tensor | None = None  # (k, V)


@dataclass
class Trace:
    """What happened while a text was generated; pass one in and read it afterwards."""

    keep_probs: bool = False  # keep every row of p and q; costs memory, not exactness
    clock: Callable[[], float] | None = None  # e.g. time.perf_counter: sums the seconds of each step
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # the new ones
    rounds: list[Round] = field(default_factory=list)  # none when the target ran alone
    finish: str | None = None  # "length", "stop" or "context"; None while running
    target_passes: int = 0  # forward passes after the prefill
    seconds: dict[str, float] = field(default_factory=dict)  # by step: prefill, draft, verify, decide, roll back
    _mark: float = 0.0

    def mark(self, step: str | None = None) -> None:
        """Charge the time since the last mark to ``step``; does nothing without a clock."""
        if self.clock is not None:
            now = self.clock()
            if step is not None:
                self.seconds[step] = self.seconds.get(step, 0.0) + now - self._mark
            self._mark = now


def generate(
    target: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    randomness: Randomness | None = None,
    trace: Trace | None = None,
) -> Iterator[int]:
    """Stream new tokens from the target alone, one forward pass each: the baseline of every comparison.

    Ends after ``max_new_tokens``, after a token in ``stop`` (which is emitted), or at the context limit;
    ``trace.finish`` says which. ValueError for an empty prompt, one beyond the context, ids it does not know, or a target
    with a trimmed output layer.
    """
    trace, randomness = trace or Trace(), randomness or Randomness(device=target.device)
    text, limit, reason = _plan(target, prompt, max_new_tokens)
    cache = target.new_cache()
    trace.prompt, trace.finish = list(text), None
    trace.mark()
    prefill(target, text, cache)
    trace.mark("prefill")
    token = torch.tensor(text[-1:], device=target.device)
    while len(text) < limit:
        token, _ = draw_next(target, token[None], cache, sampling, randomness, "target")  # (1,)
        text.append(_checked(int(token), target.config.n_ids, "target"))
        trace.tokens.append(text[-1])
        trace.target_passes += 1
        trace.mark("decode")
        if text[-1] in stop:
            reason = "stop"
            limit = len(text)
        yield text[-1]
    trace.finish = reason


def speculate(
    target: Transformer,
    prompt: list[int],
    *,
    drafter: Drafter,
    k: int,
    rule: Rule = token_wise,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    randomness: Randomness | None = None,
    trace: Trace | None = None,
) -> Iterator[int]:
    """Stream tokens that follow exactly the law of `generate`, 1 to k+1 of them for each pass of the target.

    As `generate`, and ``drafter`` proposes up to ``k`` ≥ 1 tokens a round while ``rule`` decides which stay. Beyond the
    drafter's context the target goes on alone.
    """
    if k < 1:
        raise ValueError(f"k is {k}; draft at least 1 token a round, or use generate() for the target alone.")
    if drafter.n_ids != target.config.n_ids:
        raise ValueError(f"the draft knows {drafter.n_ids} ids and the target {target.config.n_ids}; use one tokenizer.")
    trace, randomness = trace or Trace(), randomness or Randomness(device=target.device)
    text, limit, reason = _plan(target, prompt, max_new_tokens)
    readable = (drafter.context or target.config.context) + 1  # the last token drafted is not read
    cache = target.new_cache()
    trace.prompt, trace.finish = list(text), None
    drafter.start()
    trace.mark()
    prefill(target, text, cache)
    trace.mark("prefill")
    following = torch.tensor(text[-1:], device=target.device)  # (1,), the newest token, which the target has not read
    no_gradients = torch.inference_mode()

    while len(text) < limit:
        start = len(text)
        with no_gradients:  # not around the yields: what the reader of the stream does is not ours
            # 1. Draft: up to k tokens from q, one after another. No more than could still be used, or read by the drafter.
            most = max(0, min(k, limit - start - 1, readable - start))
            drafted, q = _of_shape(*drafter.propose(text, most, sampling, randomness), most, drafter.n_ids)
            trace.mark("draft")

            # 2. Verify: one target pass reads the last accepted token and every draft → k+1 rows of p.
            unread = torch.cat([following, drafted])[None]
            if drafted.numel():
                p = next_probs(target, unread, cache, sampling, "target")  # (k+1, V)
                trace.mark("verify")

                # 3. Decide: a prefix of the drafts stays, and one token of the target's own follows it.
                accepted, following = rule(drafted, q, p, randomness)
            else:  # nothing to decide: a plain step of the target
                following, p = draw_next(target, unread, cache, sampling, randomness, "target")
                accepted = 0
                trace.mark("verify")
            accepted, proposal, newest = on_host(accepted, drafted, following)
        _checked(newest, target.config.n_ids, "target", q)
        emitted = proposal[:accepted] + [newest]
        for i, token in enumerate(emitted):
            if token in stop:
                emitted, reason, limit = emitted[: i + 1], "stop", start + i + 1
                break
        trace.mark("decide")

        # 4. Roll back: both caches forget what was not accepted. The newest token has not been read by either.
        text += emitted
        cache.truncate(len(text) - 1)
        drafter.truncate(len(text) - 1)
        trace.rounds.append(Round(start, proposal, accepted, emitted, *((p, q) if trace.keep_probs else ())))
        trace.target_passes += 1
        trace.mark("roll back")

        for token in emitted:
            trace.tokens.append(token)
            yield token
        trace.mark()  # what the reader of the stream does in between is not ours
    trace.finish = reason


def prefill(target: Transformer, text: list[int], cache) -> None:
    """Read all of the text but its last token, which the first decoding step reads."""
    if len(text) > 1:
        read(target, torch.tensor([text[:-1]], device=target.device), cache)


def on_host(accepted: int | Tensor, drafted: Tensor, following: Tensor) -> tuple[int, list[int], int]:
    """What was decided, as numbers. An accelerator is asked once: it is the only time of a round that the host waits."""
    if drafted.is_cpu:
        return int(accepted), drafted.tolist(), int(following)
    accepted = torch.as_tensor(accepted, device=drafted.device)
    accepted, *proposal, newest = torch.cat([accepted[None], drafted, following]).tolist()
    return accepted, proposal, newest


def _of_shape(drafted: Tensor, q: Tensor, most: int, n_ids: int) -> tuple[Tensor, Tensor]:
    """A proposal as the rules take it for granted; a drafter of one's own may get it wrong."""
    n = len(drafted)
    if n > most or drafted.shape != (n,) or q.shape != (n, n_ids):
        raise ValueError(
            f"the drafter was asked for at most {most} tokens and proposed tokens {tuple(drafted.shape)} with rows "
            f"{tuple(q.shape)} of q; return (n,) tokens and the (n, {n_ids}) rows they were drawn from, n at most {most}."
        )
    return drafted, q


def _checked(token: int, n_ids: int, model: str, draft_probs: Tensor | None = None) -> int:
    """``token``, or the error that `Sampling.probs` could not raise without making an accelerator wait."""
    if token >= n_ids:
        raise ValueError(not_finite("draft model" if draft_probs is not None and draft_probs.isnan().any() else model))
    return token


def _plan(target: Transformer, prompt: list[int], max_new_tokens: int) -> tuple[list[int], int, str]:
    """The prompt as plain numbers, the length at which the text ends, and the word for why."""
    try:
        prompt, context = [index(token) for token in prompt], target.config.context
    except TypeError:
        raise ValueError("the prompt is no list of ids; encode text first, with the encode of the model's tokenizer.") from None
    if getattr(target, "offered", None) is not None:
        raise ValueError("the target's output layer is trimmed, so it has no law of its own; give it with all its ids.")
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, for example the end-of-text id.")
    if len(prompt) > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens and the context {context}; shorten the prompt.")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 0 or more.")
    if min(prompt) < 0 or max(prompt) >= target.config.n_ids:
        raise ValueError(f"the prompt has an id outside 0 … {target.config.n_ids - 1}; use the model's own tokenizer.")
    wanted = len(prompt) + max_new_tokens
    return prompt, min(wanted, context), "length" if wanted <= context else "context"
