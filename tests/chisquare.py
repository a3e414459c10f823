"""Pearson's χ² without scipy: merged cells, a bound of known false-alarm rate, and the deviation it would catch.

Rare outcomes share cells, and what moves inside a cell cannot be seen. So the same counts are tested once more with the
rare ones in other cells: what is to pass unseen has to balance in the cells of both partitions.

The statistic's first three cumulants are those of the counts themselves, not of the χ² distribution that they tend to:
cells of expectation 5 raise the variance and the skewness, and that far out it matters.
"""

from dataclasses import dataclass

import numpy as np
import torch

ALARM = 5e-9  # probability that one test raises a false alarm; a run makes fewer than two hundred
LEAST = 5.0  # smallest expectation of a cell


def cells(expected: np.ndarray, regrouped: bool = False) -> np.ndarray:
    """Which cell each outcome belongs to: its own, or, below `LEAST`, one shared with others until it is reached.

    Looks at expectations only, never at counts. Impossible outcomes (expectation 0) get −1. Those that share a cell are
    of about the same expectation, or, ``regrouped``, any that a fixed generator put together.
    """
    cell = np.full(len(expected), -1)
    order = np.argsort(-expected, kind="stable")
    big = int((expected >= LEAST).sum())
    cell[order[:big]] = np.arange(big)
    small = order[big : int((expected > 0).sum())]
    if regrouped:
        small = np.random.default_rng(0).permutation(small)
    filled, current = 0.0, big
    for i in small:
        cell[i] = current
        filled += expected[i]
        if filled >= LEAST:
            filled, current = 0.0, current + 1
    if filled and current:  # what is left over joins the cell before it
        cell[cell == current] = current - 1
    return cell


def halves(mass: np.ndarray) -> np.ndarray:
    """A half, 0 or 1, for each of ``mass``, the largest first and each to the half that is lighter so far."""
    total, half = [0.0, 0.0], np.zeros(len(mass), dtype=int)
    for i in np.argsort(-mass, kind="stable"):
        half[i] = total[0] > total[1]
        total[half[i]] += mass[i]
    return half


def tail(z: float, shape: float) -> float:
    """P(Z > z) of a standardised gamma variable of that shape; χ² with df degrees has shape df/2."""
    x = max(shape + z * shape**0.5, 0.0)
    return float(torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))


def critical(alarm: float, shape: float) -> float:
    """The z beyond which the tail is ``alarm``."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, shape) > alarm else (low, middle)
    return high


@dataclass(frozen=True)
class ChiSquare:
    """A test of counts against probabilities, decided on before anything is counted."""

    cell: np.ndarray
    meant: np.ndarray  # expectation of each cell
    n: int

    @classmethod
    def of(cls, probs, n: int, regrouped: bool = False) -> "ChiSquare":
        expected = normalised(probs) * n
        cell = cells(expected, regrouped)
        return cls(cell, np.bincount(cell[cell >= 0], expected[cell >= 0]), n)

    @property
    def crowded(self) -> np.ndarray:
        """The cells that several outcomes share."""
        return np.flatnonzero(np.bincount(self.cell[self.cell >= 0]) > 1)

    @property
    def shared(self) -> float:
        """The mass of the outcomes that share a cell: what moves inside of it, this test does not see."""
        return float(self.meant[self.crowded].sum() / self.n)

    @property
    def variance(self) -> float:
        """Of the statistic, exactly, for multinomial counts."""
        c = len(self.meant)
        return 2 * (c - 1) + float((1 / self.meant).sum()) - (c * c + 2 * c - 2) / self.n

    @property
    def shape(self) -> float:
        """4 ÷ skewness², with the third cumulant of independent Poisson counts, which is slightly too large."""
        third = float((8 + 22 / self.meant + 1 / self.meant**2).sum())
        return 4 * self.variance**3 / third**2

    @property
    def bound(self) -> float:
        """What z stays below. With a single cell there is nothing to count, only the impossible to be seen."""
        return critical(ALARM, self.shape) if len(self.meant) > 1 else 1.0

    def seen(self, counts) -> np.ndarray:
        counts = np.asarray(counts, dtype=np.float64)
        assert counts.sum() == self.n
        return np.bincount(self.cell[self.cell >= 0], counts[self.cell >= 0], minlength=len(self.meant))

    def z(self, counts) -> float:
        """(X² − its mean) ÷ its standard deviation. What is impossible and yet seen counts as infinitely far off."""
        seen = self.seen(counts)
        if seen.sum() < self.n:
            return float("inf")
        return float(self.z_of_cells(seen)) if len(seen) > 1 else 0.0

    def z_of_cells(self, seen: np.ndarray) -> np.ndarray:
        x2 = ((seen - self.meant) ** 2 / self.meant).sum(-1)
        return (x2 - (len(self.meant) - 1)) / self.variance**0.5

    @property
    def detectable(self) -> float:
        """The total variation between cells that is caught with probability .99, whatever direction it takes.

        A deviation δ adds λ = n Σ d²/p ≥ 4nδ² to the mean, least where half of the mass grows by the factor 1 + 2δ and
        half shrinks by 1 − 2δ, and 4λ to the variance: λ is where the first percentile reaches the bound.
        """
        first = 2.326347874  # −Φ⁻¹(.01)
        v = self.variance
        s = 2 * first + (4 * first**2 + v + 4 * self.bound * v**0.5) ** 0.5
        return ((s * s - v) / 4 / (4 * self.n)) ** 0.5

    def contaminated(self, probs, delta: float) -> np.ndarray:
        """``probs`` moved by the total variation ``delta`` between cells, in the direction that is hardest to see."""
        half = halves(self.meant)
        mass = np.bincount(half, self.meant / self.n)
        factor = np.where(half == 0, 1 + delta / mass[0], 1 - delta / mass[1])
        return np.where(self.cell >= 0, normalised(probs) * factor[self.cell], 0.0)

    def contaminated_inside(self, probs, delta: float) -> np.ndarray:
        """``probs`` moved by ``delta`` inside the shared cells, between two halves of each: the same to this test."""
        probs, moved = normalised(probs), np.zeros(len(self.cell))
        for cell in self.crowded:
            ids = np.flatnonzero(self.cell == cell)
            half = halves(probs[ids])
            mass = np.bincount(half, probs[ids])
            moved[ids] = probs[ids] * mass.min() * np.where(half == 0, 1 / mass[0], -1 / mass[1])
        largest = 0.5 * np.abs(moved).sum()
        assert delta <= largest, f"a total variation of {largest:.3f} is all that can be moved inside shared cells."
        return probs + moved * (delta / largest)


def normalised(probs) -> np.ndarray:
    probs = np.asarray(probs, dtype=np.float64)
    return probs / probs.sum()
