"""Each cell: either measuring leaves the training bit-identical, and is right, or it is refused with a way out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from hypergrad import Hold, HypergradError, Race, Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.composition.estimators import ESTIMATORS, settings
from tests.callbacks.composition.features import FEATURES, VALIDATION, Feature
from tests.callbacks.composition.implicit import Dense
from tests.callbacks.composition.script import Result, made, plain, run, slope
from tests.callbacks.modules import data

WHOLE = "race, readout, rewind"
RACING = {
    "race": Race(rates=(1e-3, 1e-2), rungs=((0.15, 2), (0.3, 1)), forks=(), least=1),
    "readout": Readout(checkpoints=3, batches=2),
    "rewind": Rewind(),
    "hyperparameters": ("lr", "weight_decay"),
}
# What stands in their param groups depends on the losses, or on the steps taken.
FOLLOWS_THE_RUN = ("ReduceLROnPlateau", "Prodigy, of prodigyopt")
TABLE = Path(__file__).parents[3] / "COMPATIBILITY.md"
OUTCOMES: dict[tuple[str, str], str] = {}
HEAD = """# What works with what

Each cell is a fit of a small module with BatchNorm, dropout and a learned penalty, run by the tests
(`tests/callbacks/composition`), and this file is written from their results:
`.venv/bin/python -m pytest -m "slow or not slow" tests/callbacks/composition --write-table`.

- *unchanged*: hypergradients were taken, and weights, optimizer, schedule, random streams and logged values are
  bit-identical to those of a fit without the callback (`controller=Hold()`).
- *exact*: unchanged, and the hypergradients of lr and of the penalty are those of central differences of the whole
  script, to 1e-5 (with curvature by differences, 1e-3); of `Implicit` those of dense linear algebra. In float64.
- *works*, in the last column: the race was run, every step has the schedule's own settings beside the learned factor,
  and the module ends with the readout's weights. *No race*: lr is learned by hypergradients, and the user is told why.
- *refused*: an error at the start of the fit, or at the first step, says what to use instead.

Under `strategy="ddp"` every column gives what one process gives on the batches of all ranks, to 1e-8 in float64
(`tests/callbacks/test_ddp.py`). Strategies that shard are refused.

"""


def _parameters() -> list[Any]:
    absent = {f.name: bool(f.needs) and importlib.util.find_spec(f.needs) is None for f in FEATURES}
    return [
        pytest.param(
            f,
            id=f.name,
            marks=[
                pytest.mark.skipif(absent[f.name] or not f.available, reason=f"needs {f.needs or 'another version'}"),
                *([pytest.mark.slow] if f.slow else []),
            ],
        )
        for f in FEATURES
    ]


def _callback(feature: Feature, **chosen: Any) -> HyperGradient:
    own = {"val_dataloaders": data(40, 40, seed=2)} if feature.own_data else {}
    return HyperGradient(**chosen, **own)


def _unless_refused(feature: Feature, column: str, module: Any, *callbacks: pl.Callback) -> Result | None:
    """What the fit gave; None where it was refused with a word on what to do."""
    try:
        return run(feature, module, *callbacks)
    except HypergradError as error:
        refusal = str(error)
    OUTCOMES[feature.name, column] = "refused"
    assert re.search(r"\b[Uu]se\b|[Ll]eave '\w+' out", refusal), refusal
    assert "training_step" not in vars(module)
    return None


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


def _assert_exact(feature: Feature, estimator: str, callback: HyperGradient, dense: Dense | None) -> None:
    """The last measurement is of the last step, and is what differences of the script say."""
    last, column, script = callback.history[-1], ESTIMATORS[estimator], plain(feature)
    assert (last.step, last.status) == (script.steps, None)
    assert last.val_loss == pytest.approx(script.loss, rel=1e-9)
    for name in ("lr",) * ("lr" in column.names) + ("l2",) * column.in_loss:
        expected = slope(feature, name, column.whole) if dense is None else dense.hypergradient
        # All learning rates move by the same factor.
        moved = {k: last.values[k] if name == "lr" else 1.0 for k in last.hypergradients if k.split("/")[0] == name}
        found = sum(last.hypergradients[k] * by for k, by in moved.items())
        assert found == pytest.approx(expected, rel=column.tolerance), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("feature", _parameters())
def test_cell(feature: Feature, estimator: str) -> None:
    steps = plain(feature).steps
    dense = Dense(steps) if estimator == "Implicit" and feature.exact else None
    module = made(feature)
    halves = max(steps // 2, 1)  # one measurement on the way, one after the last step
    callback = _callback(feature, **settings(estimator, module), controller=Hold(), every_n_steps=halves)
    held = _unless_refused(feature, estimator, module, callback, *([] if dense is None else [dense]))
    if held is None:
        return
    for part in ("seen", "weights", "optimizers", "steps"):
        _assert_same(getattr(held, part), getattr(plain(feature), part))
    assert any(update.skipped is None for update in callback.history)
    OUTCOMES[feature.name, estimator] = "unchanged"
    if feature.exact:
        _assert_exact(feature, estimator, callback, dense)
        OUTCOMES[feature.name, estimator] = "exact"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", _parameters())
def test_race_readout_and_rewind(feature: Feature) -> None:
    module, callback = made(feature), _callback(feature, **RACING, every_n_steps=2)
    raced = _unless_refused(feature, WHOLE, module, callback)
    if raced is None:
        return
    assert all(bool(t.isfinite().all()) for t in raced.weights.values())
    # What is learned is a factor on the schedule, which stands in the optimizer as it would without us.
    if feature.name not in FOLLOWS_THE_RUN:
        assert [step[2] for step in raced.seen] == [step[2] for step in plain(feature).seen]
    assert any(update.skipped is None for update in callback.history)
    assert callback.ended_with is not None
    assert callback.ended_with.score < 1.3  # of the untrained module it is log(3) or more
    if feature.exact:
        with torch.no_grad():
            assert module.eval().loss(VALIDATION).item() == pytest.approx(callback.ended_with.score, rel=1e-9)
    if callback.race is None:
        OUTCOMES[feature.name, WHOLE] = "no race"
        return
    assert len(callback.race["scores"]) == 2
    OUTCOMES[feature.name, WHOLE] = "works"


def _row(feature: Feature) -> str:
    cells = (OUTCOMES[feature.name, name] for name in [*ESTIMATORS, WHOLE])
    return f"| {feature.name.replace('|', '/')} | " + " | ".join(cells) + " |"


def test_the_table_in_the_docs_is_what_the_cells_gave(request: pytest.FixtureRequest) -> None:
    columns = [*ESTIMATORS, WHOLE]
    head = HEAD + "| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|\n"
    rows = {f.name: _row(f) for f in FEATURES if all((f.name, name) in OUTCOMES for name in columns)}
    if request.config.getoption("--write-table", default=False):
        assert len(rows) == len(FEATURES), "some cells were not run"
        TABLE.write_text(head + "\n".join(rows.values()) + "\n")
    if not rows:
        pytest.skip("no row was run as a whole")
    text = TABLE.read_text()
    assert text.startswith(head)
    assert text.count("\n| ") == len(FEATURES) + 1
    assert [row for row in rows.values() if f"\n{row}\n" not in text] == []
