"""Stopping criteria fed with lists of floats, and the callback through real Trainers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad import ConfigurationError
from hypergrad.callbacks import (
    EarlyStopping,
    GeneralizationLoss,
    Patience,
    ProgressQuotient,
    StoppingCriterion,
    UpStrips,
)
from hypergrad.search import Float, Study, Trial
from tests.callbacks.modules import Net, data, trainer
from tests.search.objectives import net


def stops_at(rule: StoppingCriterion, errors: Sequence[float], training: Sequence[float] | None = None) -> int | None:
    """The epoch, from 1, after which `rule` stops."""
    for epoch, error in enumerate(errors, 1):
        if rule.update(error, training[epoch - 1] if training else None) is not None:
            return epoch
    return None


# Prechelt's criteria, by hand: E_opt is 2.0 from epoch 4 on.
ERRORS = [4.0, 3.0, 2.5, 2.0, 2.1, 2.05, 2.2, 2.3, 2.4, 2.5]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Patience(1), 5),
        (Patience(3), 7),
        (Patience(7), None),
        (Patience(2, min_delta=0.6), 6),  # 2.5 does not improve on 3.0 by more than 0.6, 2.0 does, 2.1 and 2.05 do not
        (GeneralizationLoss(4.9), 5),
        (GeneralizationLoss(5.1), 7),
        (GeneralizationLoss(20.1), 10),
        (GeneralizationLoss(26.0), None),
        (UpStrips(1, 1), 5),
        (UpStrips(2, 1), 8),
        (UpStrips(4, 1), 10),
        (UpStrips(1, 2), 6),  # 3.0, 2.0, 2.05, 2.3, 2.5: up at epochs 6, 8, 10
        (UpStrips(3, 2), 10),
        (UpStrips(1, 5), 10),
    ],
)
def test_rules_on_a_list(rule: StoppingCriterion, expected: int | None) -> None:
    assert stops_at(rule, ERRORS) == expected


def test_progress_quotient_by_hand() -> None:
    # Strip of epochs 1 and 2: no generalization loss. Epochs 3 and 4: GL = 100 (1.2 / 1 - 1) = 20,
    # P = 1000 (3.0 / (2 * 1.4) - 1) = 71.43, quotient 0.28.
    errors, training = [1.5, 1.0, 1.1, 1.2], [3.0, 2.0, 1.6, 1.4]
    rule = ProgressQuotient(alpha=0.27, strip=2)
    assert stops_at(rule, errors, training) == 4
    assert rule.loss == pytest.approx(20.0)
    assert rule.progress == pytest.approx(1000 * (3.0 / 2.8 - 1))
    assert stops_at(ProgressQuotient(alpha=0.29, strip=2), errors, training) is None
    # Training stands still while validation gets worse.
    assert stops_at(ProgressQuotient(alpha=100.0, strip=2), errors, [1.0] * 4) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patience(0), "`epochs` must be"),
        (lambda: Patience(1, -0.1), "`min_delta` must be"),
        (lambda: GeneralizationLoss(0.0), "`alpha` must be"),
        (lambda: ProgressQuotient(1.0, strip=0), "`strip` must be"),
        (lambda: UpStrips(0), "`strips` must be"),
        (lambda: GeneralizationLoss().update(0.0), "needs them positive, but got 0.0"),
        (lambda: ProgressQuotient().update(1.0), "needs the training error.*train_monitor"),
        (lambda: EarlyStopping(criterion="patience"), "`criterion` must be"),
        (lambda: EarlyStopping(criterion=[]), "`criterion` must be"),
        (lambda: EarlyStopping(mode="auto"), "`mode` must be"),
        (lambda: EarlyStopping(3), "`monitor` must be"),
        (lambda: EarlyStopping(mode="max", criterion=GeneralizationLoss()), "monitor an error"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


class Told(Net):
    """Logs given numbers as its metrics, one per epoch, and remembers its weights."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(lr=0.1)
        self.values, self.weights = values, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", 2.0 - 0.1 * self.current_epoch, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.values[self.current_epoch])

    def on_train_epoch_end(self) -> None:
        self.weights.append(self.net[0].weight.detach().clone())


def fitted(values: Sequence[float], callback: EarlyStopping, tmp: Path, **kwargs: Any) -> Told:
    module = Told(values)
    trainer(tmp, callbacks=[callback], max_epochs=len(values), **kwargs).fit(module, data(), data(seed=1))
    return module


def test_the_callback_stops_and_says_why(tmp_path: Path) -> None:
    callback = EarlyStopping(criterion=[Patience(5), GeneralizationLoss(4.9)])
    module = fitted(ERRORS, callback, tmp_path)
    assert len(module.weights) == 5
    assert callback.reason == "early stopping after epoch 4: val_loss: generalization loss of 5% exceeds 4.9%"
    assert (callback.best_score, callback.best_epoch) == (2.0, 3)
    torch.testing.assert_close(module.net[0].weight, module.weights[4], rtol=0, atol=0)
    # Used again, it starts again.
    assert len(fitted([1.0] * 3, callback, tmp_path).weights) == 3
    assert callback.reason is None


def test_the_training_error_reaches_the_criterion(tmp_path: Path) -> None:
    callback = EarlyStopping(criterion=ProgressQuotient(alpha=0.1, strip=2))
    assert len(fitted([1.0, 1.0, 1.0, 1.1, 1.2, 1.3], callback, tmp_path).weights) == 4
    # GL = 10, and the training errors of the strip were 1.8 and 1.7: P = 1000 (3.5 / 3.4 - 1).
    assert f"progress quotient of {10 / (1000 * (3.5 / 3.4 - 1)):.3g} exceeds 0.1" in str(callback.reason)


@pytest.mark.parametrize(("mode", "values"), [("min", [3.0, 1.0, 2.0, 2.0]), ("max", [1.0, 3.0, 2.0, 2.0])])
def test_the_best_weights_come_back(tmp_path: Path, mode: Any, values: list[float]) -> None:
    module = fitted(values, EarlyStopping(criterion=Patience(2), mode=mode, restore_best_weights=True), tmp_path)
    assert len(module.weights) == 4
    torch.testing.assert_close(module.net[0].weight, module.weights[1], rtol=0, atol=0)
    assert not torch.equal(module.weights[1], module.weights[3])


@pytest.mark.parametrize(
    ("settings", "values", "epochs", "reason"),
    [
        ({}, [1.0, math.nan, 1.0], 2, "the value is nan"),
        ({"check_finite": False}, [1.0, math.nan, 1.0], 3, None),
        ({"stopping_threshold": 0.5}, [1.0, 0.4, 0.3], 2, "better than stopping_threshold=0.5"),
        ({"divergence_threshold": 5.0}, [1.0, 6.0, 1.0], 2, "worse than divergence_threshold=5"),
        ({"mode": "max", "stopping_threshold": 0.9}, [0.5, 0.95, 0.3], 2, "better than stopping_threshold"),
    ],
)
def test_thresholds(tmp_path: Path, settings: Any, values: list[float], epochs: int, reason: str | None) -> None:
    callback = EarlyStopping(**settings)
    assert len(fitted(values, callback, tmp_path).weights) == epochs
    assert (reason is None and callback.reason is None) or str(reason) in str(callback.reason)


def test_a_metric_that_is_not_logged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'val_acc' is not among the logged metrics \['train_loss', 'val_loss'\]"
    ):
        fitted([1.0], EarlyStopping("val_acc"), tmp_path)


def test_it_is_continued_from_a_checkpoint(tmp_path: Path) -> None:
    first = EarlyStopping(criterion=Patience(3), restore_best_weights=True)
    module = Told([1.0, 2.0, 3.0, 4.0, 5.0])
    begun = trainer(tmp_path, callbacks=[first], max_epochs=2)
    begun.fit(module, data(), data(seed=1))
    best = module.weights[0]
    begun.save_checkpoint(tmp_path / "last.ckpt")
    second, module = EarlyStopping(criterion=Patience(3), restore_best_weights=True), Told([1.0, 2.0, 3.0, 4.0, 5.0])
    again = trainer(tmp_path, callbacks=[second], max_epochs=5)
    again.fit(module, data(), data(seed=1), ckpt_path=tmp_path / "last.ckpt")
    assert second.reason == "early stopping after epoch 3: val_loss: no improvement on 1 for 3 epochs"
    torch.testing.assert_close(module.net[0].weight, best, rtol=0, atol=0)


def test_the_reason_reaches_the_record_of_a_trial(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        stopping = EarlyStopping(stopping_threshold=100.0)
        return net(trial, callbacks=[stopping]).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space={"lr": Float(1e-3, 1e-2)}).run(train, 1)
    assert record.state == "complete"
    assert "early stopping after epoch 0" in str(record.reason)


def test_a_checkpoint_that_is_validated_between_two_fits_is_not_continued(tmp_path: Path) -> None:
    rule = EarlyStopping(criterion=Patience(2), restore_best_weights=True)
    fitted = trainer(tmp_path, callbacks=[rule], max_epochs=3)
    fitted.fit(Net(lr=0.1), data(), data(seed=1))
    fitted.save_checkpoint(tmp_path / "first.ckpt")
    first = rule.best_score
    trainer(tmp_path, callbacks=[rule]).validate(Net(), data(seed=1), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    trainer(tmp_path, callbacks=[rule], max_epochs=2).fit(Net(lr=1e-6), data(), data(seed=1))
    assert rule.reason is None
    assert rule.best_score > first
