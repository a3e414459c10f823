"""The engine without any cache, and what a round decided with one and without."""

import torch


class NoCache:
    """The engine's view of a cache, which only remembers the ids."""

    def __init__(self):
        self.ids = []

    @property
    def length(self):
        return len(self.ids)

    def truncate(self, length):
        del self.ids[length:]


class Uncached:
    """A model that reads the whole text again in every pass."""

    def __init__(self, model):
        self.model, self.config, self.dtype, self.device = model, model.config, model.dtype, model.device
        self.offered = model.offered

    def new_cache(self, *_, **__):
        return NoCache()

    def __call__(self, ids, cache):
        cache.ids += ids[0].tolist()
        return self.model(torch.tensor([cache.ids]))[:, -ids.shape[1] :]


def differences(found, expected):
    """(rounds that decided differently or that only one of the two has, largest difference of a probability before the first
    of them)."""
    largest, different = 0.0, 0
    for a, b in zip(found, expected):
        if (a.drafted, a.accepted, a.emitted) != (b.drafted, b.accepted, b.emitted):
            different += 1
        if not different:
            for x, y in ((a.target_probs, b.target_probs), (a.draft_probs, b.draft_probs)):
                largest = max(largest, float((x - y).abs().max())) if len(x) else largest
    return different + abs(len(found) - len(expected)), largest
