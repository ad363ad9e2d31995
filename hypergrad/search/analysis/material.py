"""What a report is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from hypergrad.search.parameter import Constant
from hypergrad.search.record import TrialRecord
from hypergrad.search.spec import StudySpec


@dataclass(frozen=True)
class Material:
    """A study's settings, its trials, and the same trials as Optuna has them."""

    spec: StudySpec
    records: Sequence[TrialRecord]
    study: optuna.Study

    @property
    def complete(self) -> list[TrialRecord]:
        """Trials with a value."""
        return [r for r in self.records if r.state == "complete"]

    def values(self, objective: int) -> list[tuple[TrialRecord, float]]:
        """Finite values of one objective, by trial."""
        found = []
        for record in self.complete:
            value = record.value[objective] if isinstance(record.value, tuple) else record.value
            if isinstance(value, float) and math.isfinite(value):
                found.append((record, value))
        return found

    def ranked(self) -> list[TrialRecord]:
        """Complete trials, the best in the first objective first."""
        sign = 1.0 if self.spec.directions[0] == "minimize" else -1.0
        return [record for record, _ in sorted(self.values(0), key=lambda pair: sign * pair[1])]

    def varying(self) -> list[str]:
        """Names of what had at least two values in complete trials; not to be active counts as one."""
        space = self.spec.space
        seen = {name: {r.params.get(name) for r in self.complete} for name in space}
        return [name for name, values in seen.items() if len(values) > 1 and not isinstance(space[name], Constant)]
