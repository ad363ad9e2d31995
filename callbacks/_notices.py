"""What the user is told while a run goes on, each kind of thing once."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from hypergrad import Contraction


class Notices:
    """Warnings of one run."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn(self, step: int, notice: str) -> None:
        """Say it, unless something that begins alike has been said."""
        kind = notice[:30]
        if kind not in self._told:
            self._told.add(kind)
            rank_zero_warn(f"HyperGradient at step {step}: {notice}.")

    def status(self, step: int, contractions: Sequence[Contraction]) -> str | None:
        """What an estimator has to say about its numbers, also as a warning the first time."""
        found = [c.status for c in contractions if c.status != "ok"]
        found += [
            f"the training losses that were differentiated do not depend on {', '.join(c.unused)} (is it used, without "
            ".item() or .detach(), in a term that also has parameters?)"
            for c in contractions
            if c.unused
        ]
        for status in found:
            self.warn(step, status)
        return "; ".join(found) or None
