"""When to stop training: rules that are fed with one number per epoch and know nothing of Lightning."""

from __future__ import annotations

import abc
import math
from itertools import pairwise
from typing import Any

from hypergrad import ConfigurationError


class StoppingCriterion(abc.ABC):
    """A rule with a memory. Values are errors: smaller is better (`EarlyStopping` turns the sign for `mode="max"`)."""

    needs_training = False  # whether `update` must be given the training error
    needs_positive = False  # whether it works with ratios of errors

    def __init__(self) -> None:
        self._history: list[float] = []
        self._training: list[float] = []

    def update(self, error: float, training: float | None = None) -> str | None:
        """Take the validation error of one more epoch, and its training error; why to stop, or None to go on.

        Raises:
            ConfigurationError: for an error that is not positive where ratios are taken, or a missing training error.
        """
        if self.needs_positive and not error > 0.0:
            raise ConfigurationError(
                f"{type(self).__name__} compares errors by their ratio and needs them positive, but got {error}: "
                "monitor a loss or an error rate, with mode='min'."
            )
        if self.needs_training and training is None:
            raise ConfigurationError(
                f"{type(self).__name__} needs the training error: log it with on_epoch=True, and name it by "
                "EarlyStopping(train_monitor=...)."
            )
        self._history.append(error)
        if training is not None:
            self._training.append(training)
        return self.decide()

    @abc.abstractmethod
    def decide(self) -> str | None:
        """Why to stop after the last epoch, or None."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"history": list(self._history), "training": list(self._training)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._history, self._training = list(state["history"]), list(state["training"])

    @property
    def _best(self) -> float:
        return min(self._history, default=math.inf)


class Patience(StoppingCriterion):
    """Stop after `epochs` epochs in a row that did not improve on the best by more than `min_delta`.

    Args:
        epochs: at least 1.
        min_delta: at least 0, in units of the monitored metric.

    >>> rule = Patience(2)
    >>> [rule.update(error) for error in (1.0, 0.5, 0.6)]
    [None, None, None]
    >>> rule.update(0.5)
    'no improvement on 0.5 for 2 epochs'
    """

    def __init__(self, epochs: int = 3, min_delta: float = 0.0) -> None:
        super().__init__()
        _check_count("epochs", epochs)
        if not 0.0 <= min_delta < math.inf:
            raise ConfigurationError(f"`min_delta` must be at least 0 and finite, but got {min_delta!r}.")
        self.epochs, self.min_delta = epochs, min_delta

    def decide(self) -> str | None:
        """Count the epochs since the last improvement."""
        best, since = math.inf, 0
        for error in self._history:
            best, since = (error, 0) if error < best - self.min_delta else (best, since + 1)
        return f"no improvement on {best:g} for {since} epochs" if since >= self.epochs else None


class GeneralizationLoss(StoppingCriterion):
    """Stop when the validation error is `alpha` percent above its minimum.

    GL(t) = 100 (E_va(t) / min_{t' <= t} E_va(t') - 1) > alpha: the class GL of Prechelt, "Early Stopping - But When?"
    (1998), equation 1.

    Args:
        alpha: percent, positive; Prechelt uses 1 to 5.

    >>> rule = GeneralizationLoss(alpha=5.0)
    >>> [rule.update(error) for error in (1.0, 0.8, 0.83)]
    [None, None, None]
    >>> rule.update(0.85)
    'generalization loss of 6.25% exceeds 5%'
    """

    needs_positive = True

    def __init__(self, alpha: float = 5.0) -> None:
        super().__init__()
        _check_positive("alpha", alpha)
        self.alpha = alpha

    @property
    def loss(self) -> float:
        """GL(t), in percent."""
        return 100.0 * (self._history[-1] / self._best - 1.0)

    def decide(self) -> str | None:
        """Compare GL with alpha."""
        return f"generalization loss of {self.loss:.3g}% exceeds {self.alpha:g}%" if self.loss > self.alpha else None


class ProgressQuotient(GeneralizationLoss):
    """Stop when the generalization loss is large compared with the progress that training still makes.

    At the end of every strip of k epochs: GL(t) / P_k(t) > alpha, where the training progress
    P_k(t) = 1000 (sum of E_tr over the strip / (k min of E_tr over the strip) - 1): the class PQ of Prechelt 1998,
    equations 2 and 3. A strip without any progress and with a generalization loss stops too.

    Args:
        alpha: positive; Prechelt uses 0.5 to 3.
        strip: k, in epochs, at least 1.
    """

    needs_training = True

    def __init__(self, alpha: float = 1.0, strip: int = 5) -> None:
        super().__init__(alpha)
        _check_count("strip", strip)
        self.strip = strip

    @property
    def progress(self) -> float:
        """P_k(t), in per mille."""
        strip = self._training[-self.strip :]
        return 1000.0 * (sum(strip) / (len(strip) * min(strip)) - 1.0)

    def decide(self) -> str | None:
        """Compare the quotient with alpha at the end of a strip."""
        if len(self._history) % self.strip or self.loss == 0.0:
            return None
        quotient = self.loss / self.progress if self.progress > 0.0 else math.inf
        return f"progress quotient of {quotient:.3g} exceeds {self.alpha:g}" if quotient > self.alpha else None


class UpStrips(StoppingCriterion):
    """Stop when the validation error has gone up over `strips` successive strips of k epochs.

    Compared are the ends of strips, E_va(t) > E_va(t - k): the class UP of Prechelt 1998, section 2.1.

    Args:
        strips: s, at least 1; Prechelt uses 2 to 8.
        strip: k, in epochs, at least 1.

    >>> rule = UpStrips(strips=2, strip=1)
    >>> [rule.update(error) for error in (1.0, 0.5, 0.6)]
    [None, None, None]
    >>> rule.update(0.7)
    'the error went up over 2 successive strips of 1 epochs'
    """

    def __init__(self, strips: int = 3, strip: int = 5) -> None:
        super().__init__()
        _check_count("strips", strips)
        _check_count("strip", strip)
        self.strips, self.strip = strips, strip

    def decide(self) -> str | None:
        """Look at the ends of the last strips."""
        ends = self._history[self.strip - 1 :: self.strip]
        if len(self._history) % self.strip or len(ends) <= self.strips:
            return None
        last = ends[-self.strips - 1 :]
        if all(b > a for a, b in pairwise(last)):
            return f"the error went up over {self.strips} successive strips of {self.strip} epochs"
        return None


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"`{name}` must be an integer of at least 1, but got {value!r}.")


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ConfigurationError(f"`{name}` must be positive and finite, but got {value!r}.")
