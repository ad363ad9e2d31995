"""A short race of learning rates from the initial weights: who is behind drops out, the last one goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypergrad.controllers.rewind import notable
from hypergrad.errors import ConfigurationError

_DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Race:
    """Successive halving over learning rates, whose arms are never restarted.

    Every arm starts from the initial weights and takes the same batches. At the end of each rung arms are compared by
    their validation loss, and only the best go on, each from where it stands. The winner is the training: it is not
    begun anew. From a start that is too high nothing is left, for its arm lost and its weights are gone.

    While no arm has learned anything yet, the highest rates that have done no harm go on; see `boldest_arms`.

    Before the last rung the best arm is forked: copies of it go on under learning rates between the decades.

    Successive halving: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
    optimization", algorithm 1; here the budget of a rung is a share of the run.

    Args:
        rates: learning rates, positive; the user's own is always one more. They are those of the param group with the
            largest one, and the others keep their ratio to it.
        rungs: (share of the run's steps at which the rung ends, arms that go on), in order; the last keeps one.
        forks: factors on the learning rate of the arm that leads before the last rung, positive; () for no forks.
        least: steps that the first rung must have at least; a run that is too short for that has no race.

    Raises:
        ConfigurationError: for rates or rungs that make no race.
    """

    rates: Sequence[float] = _DECADES
    rungs: Sequence[tuple[float, int]] = ((1 / 128, 3), (1 / 64, 1), (1 / 32, 1))
    forks: Sequence[float] = (10**-0.5, 10**0.5)
    least: int = 4

    def __post_init__(self) -> None:
        if not self.rates or not all(math.isfinite(r) and r > 0.0 for r in self.rates):
            raise ConfigurationError(f"`rates` must be positive learning rates, but got {self.rates!r}.")
        shares, kept = [share for share, _ in self.rungs], [count for _, count in self.rungs]
        ordered = shares == sorted(set(shares)) and kept == sorted(kept, reverse=True)
        if not self.rungs or not ordered or not shares[0] > 0.0 or shares[-1] >= 1.0 or kept[-1] != 1:
            raise ConfigurationError(
                "`rungs` must be (share of the run, arms that go on) with rising shares below 1 and numbers of "
                f"arms that do not rise and end with 1, but got {self.rungs!r}."
            )
        if not all(math.isfinite(f) and f > 0.0 for f in self.forks):
            raise ConfigurationError(f"`forks` must be positive factors, but got {self.forks!r}.")
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 1:
            raise ConfigurationError(f"`least` must be an integer of at least 1, but got {self.least!r}.")

    def ends(self, steps: int) -> list[tuple[int, int]]:
        """(step after which the rung ends, arms that go on) of a run of so many steps; empty where it is too short.

        >>> Race().ends(1000)
        [(8, 3), (16, 1), (32, 1)]
        """
        ends = [(math.ceil(share * steps), count) for share, count in self.rungs]
        return ends if ends[0][0] >= self.least else []

    def arms(self, own: float) -> list[float]:
        """The learning rates that race, the user's own first.

        >>> Race(rates=(1e-3, 1e-2)).arms(1e-3)
        [0.001, 0.01]
        """
        others = [r for r in self.rates if not math.isclose(r, own, rel_tol=0.2)]
        return [own, *others]

    def cost(self, steps: int) -> int:
        """Training gradients beside those of the run itself, if no arm falls before its rung ends.

        >>> Race().cost(1000)  # 6 more arms for 8 steps, 2 for 8, 2 for 16
        96
        """
        total, begun = 0, 0
        for (end, _), arms in zip(self.ends(steps), self._arms(), strict=False):
            total += (end - begun) * (arms - 1)
            begun = end
        return total

    @property
    def scores(self) -> int:
        """How often an arm is judged by its validation loss, the untrained one included."""
        return 1 + sum(self._arms())

    def _arms(self) -> list[int]:
        """How many run in each rung."""
        arms = [len(self.rates) + 1]
        for at, (_, kept) in enumerate(self.rungs[:-1]):
            last = at == len(self.rungs) - 2
            arms.append(min(kept, arms[-1]) + (len(self.forks) if last else 0))
        return arms


def best_arms(scores: Mapping[int, float], keep: int) -> list[int]:
    """The arms with the lowest scores, best first; one whose score is no number never goes on while another has one.

    >>> best_arms({0: math.nan, 1: 0.5, 2: 0.4}, 2)
    [2, 1]
    """
    ranked = sorted(scores, key=lambda arm: (not math.isfinite(scores[arm]), scores[arm], arm))
    finite = [arm for arm in ranked if math.isfinite(scores[arm])]
    return (finite or ranked[:1])[:keep]


def boldest_arms(scores: Mapping[int, float], rates: Sequence[float], keep: int, untrained: float) -> list[int]:
    """The same while no arm has learned anything yet: those with the highest rates that have done no harm come first.

    Deep networks often stand still for a while. Scores that differ by noise would choose any rate, and one that is too
    low is never found out, while one that is too high is.

    Args:
        rates: of the arms.
        untrained: the score before training. A fiftieth less is something learned, a two hundredth more is harm.

    >>> boldest_arms({0: 2.302, 1: 2.301, 2: 2.303}, [1e-4, 1e-3, 1e-2], 2, untrained=2.302)
    [2, 1]
    >>> boldest_arms({0: 2.302, 1: 2.001, 2: 2.303}, [1e-4, 1e-3, 1e-2], 2, untrained=2.302)
    [1, 0]
    """
    ranked, harm = best_arms(scores, len(scores)), untrained + 0.005 * abs(untrained)
    if has_learned(scores[ranked[0]], untrained):
        return ranked[:keep]
    harmless = sorted((arm for arm in ranked if scores[arm] <= harm), key=lambda arm: -rates[arm])
    return [*harmless, *(arm for arm in ranked if arm not in harmless)][:keep]


def has_learned(score: float, untrained: float) -> bool:
    """Whether a score is better than before training by more than a fiftieth; True where that is not known."""
    return not score >= untrained - notable(untrained)
