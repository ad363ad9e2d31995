"""Each cell: either measuring leaves the training bit-identical, or it is refused with a word on what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from hypergrad import Hold, HypergradError, Race, Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.composition.estimators import ESTIMATORS, settings
from tests.callbacks.composition.features import EPOCHS, FEATURES, Feature
from tests.callbacks.modules import data, trainer

WHOLE = "race, readout, rewind"
RACING = {
    "race": Race(rates=(1e-3, 1e-2), rungs=((0.15, 2), (0.3, 1)), forks=(), least=1),
    "readout": Readout(checkpoints=3, batches=2),
    "rewind": Rewind(),
    "hyperparameters": ("lr", "weight_decay"),
}
FOLLOWS_THE_LOSS = ("ReduceLROnPlateau",)  # its schedule is another one where the losses are
TABLE = Path(__file__).parents[3] / "COMPATIBILITY.md"
OUTCOMES: dict[tuple[str, str], str] = {}
HEAD = """# What works with what

Each cell is a fit of a small module with BatchNorm, dropout and a learned penalty, run by the tests
(`tests/callbacks/composition`), and this file is written from their results:
`.venv/bin/python -m pytest tests/callbacks/composition --write-table`.

- *exact*: hypergradients were taken, and weights, optimizer, schedule, random streams and logged values are
  bit-identical to those of a fit without the callback (`controller=Hold()`).
- *works*, in the last column: the race was run, every step has the schedule's own settings beside the learned factor,
  and the module ends with the readout's weights. *No race*: lr is learned by hypergradients, and the user is told why.
- *refused*: an error at the start of the fit, or at the first step, says what to use instead.

That the numbers are right is tested elsewhere, against central differences of whole trainings in float64.

"""


class Witness(pl.Callback):
    """What every batch saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("hypergradient")}
        groups = [{k: v for k, v in g.items() if k != "params"} for o in trainer.optimizers for g in o.param_groups]
        self.seen.append(
            (torch.get_rng_state().sum().item(), logged, groups, [m.training for m in pl_module.modules()])
        )


def _fit(feature: Feature, estimator: str | None, tmp: Path) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module: Any = feature.module()
    given, witness = feature.trainer(), Witness()
    callbacks, ours = [*given.pop("callbacks", []), witness], None
    if estimator is not None:
        own = {"val_dataloaders": data(40, 8, seed=2, shuffle=True)} if feature.own_data else {}
        chosen = RACING if estimator == WHOLE else {**settings(estimator, module), "controller": Hold()}
        ours = HyperGradient(**chosen, **own, every_n_steps=2)
        callbacks.insert(0, ours)
    fitted = trainer(tmp, callbacks=callbacks, **{"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **given})
    fitted.fit(torch.compile(module, backend="eager") if feature.compiled else module, **feature.loaders())
    return {
        "weights": module.state_dict(),
        "optimizers": [o.state_dict() for o in fitted.optimizers],
        "seen": witness.seen,
        "taken": [] if ours is None else [u for u in ours.history if u.skipped is None],
        "race": None if ours is None else ours.race,
        "ended_with": None if ours is None else ours.ended_with,
    }


PLAIN: dict[str, dict[str, Any]] = {}


def _plain(feature: Feature, tmp: Path) -> dict[str, Any]:
    """The fit without the callback, made once for all columns."""
    if feature.name not in PLAIN:
        PLAIN[feature.name] = _fit(feature, None, tmp)
    return PLAIN[feature.name]


def _refusal(feature: Feature, estimator: str, tmp: Path) -> tuple[dict[str, Any], str]:
    """What the fit gave, or else the error that refused it."""
    try:
        return _fit(feature, estimator, tmp), ""
    except HypergradError as error:
        return {}, str(error)


def _assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_cell(feature: Feature, estimator: str, tmp_path: Path) -> None:
    held, refusal = _refusal(feature, estimator, tmp_path)
    if refusal:
        OUTCOMES[feature.name, estimator] = "refused"
        assert "use " in refusal.lower()  # names the way out
        return
    plain = _plain(feature, tmp_path)
    for part in ("seen", "weights", "optimizers"):
        _assert_same(held[part], plain[part])
    assert held["taken"]
    OUTCOMES[feature.name, estimator] = "exact"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_race_readout_and_rewind(feature: Feature, tmp_path: Path) -> None:
    raced = _fit(feature, WHOLE, tmp_path)
    assert all(bool(t.isfinite().all()) for t in raced["weights"].values())
    # What is learned is a factor on the schedule, which stands in the optimizer as it would without us.
    groups = [[step[2] for step in run["seen"]] for run in (raced, _plain(feature, tmp_path))]
    if feature.name not in FOLLOWS_THE_LOSS:
        assert groups[0] == groups[1]
    assert raced["taken"]
    assert raced["ended_with"].score < 1.3  # of the untrained module it is log(3) or more
    if raced["race"] is None:
        OUTCOMES[feature.name, WHOLE] = "no race"
        return
    assert len(raced["race"]["scores"]) == 2
    OUTCOMES[feature.name, WHOLE] = "works"


def _table() -> str:
    columns = [*ESTIMATORS, WHOLE]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for feature in FEATURES:
        cells = (OUTCOMES[feature.name, name] for name in columns)
        lines.append(f"| {feature.name.replace('|', '/')} | " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_the_cells_gave(request: pytest.FixtureRequest) -> None:
    if len(OUTCOMES) < len(FEATURES) * (len(ESTIMATORS) + 1):
        pytest.skip("not all cells were run")
    if request.config.getoption("--write-table"):
        TABLE.write_text(_table())
    assert TABLE.read_text() == _table()
