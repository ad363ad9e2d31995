"""What a fit learns, what it counts and records, and that the next fit starts afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad import Descent
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, fit, trainer


def test_learns_upwards_from_a_hopeless_lr(tmp_path: Path) -> None:
    plain, tuned = (Net(lr=1e-6, weight_decay=0.1) for _ in range(2))
    tuned.load_state_dict(plain.state_dict())
    reference = trainer(tmp_path, max_epochs=30)
    reference.fit(plain, data(), data(seed=1))
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2)
    fitted = fit(tuned, callback, tmp_path, max_epochs=30)
    assert callback.hyperparameters["lr"] > 1e-4
    assert fitted.callback_metrics["val_loss"] < 0.6 * reference.callback_metrics["val_loss"]


def test_mode_max_climbs(tmp_path: Path) -> None:
    class Likelihood(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("log_likelihood", -self.loss(batch))

    def learned(module: Net, **kwargs: Any) -> HyperGradient:
        torch.manual_seed(0)
        for p in module.parameters():
            p.data.normal_(std=0.5)
        callback = HyperGradient(val_dataloaders=data(seed=2), **kwargs)
        fit(module, callback, tmp_path)
        return callback

    minimised = learned(Net(lr=1e-5))
    maximised = learned(Likelihood(lr=1e-5), monitor="log_likelihood", mode="max")
    assert maximised.hyperparameters == minimised.hyperparameters
    assert maximised.history[0].hypergradients["lr"] == -minimised.history[0].hypergradients["lr"]


def test_gradients_are_counted_and_the_summary_says_so(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=4)
    assert callback.summary() == "HyperGradient: not fitted yet"
    assert callback.hyperparameters == {}
    fit(Net(), callback, tmp_path)
    # 18 steps, every fourth, and one at the start that tries the validation loss
    assert [u.step for u in callback.history] == [4, 8, 12, 16]
    assert "5 validation gradients beside 18 training gradients" in callback.summary()
    assert "lr 0.01 -> " in callback.summary()


def test_a_passing_nan_skips_the_update_and_is_recorded(tmp_path: Path) -> None:
    class Nan(Net):
        calls = 0

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return loss * float("nan") if self.global_step in (2, 3) and not self.trainer.sanity_checking else loss

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    with pytest.warns(UserWarning, match="at step 2: non-finite validation loss, nothing is learned from it") as seen:
        fit(Nan(), callback, tmp_path)
    assert len([w for w in seen if "non-finite" in str(w.message)]) == 1
    skipped = [u.step for u in callback.history if u.skipped]
    assert skipped == [2, 3]
    assert callback.history[1].skipped == "non-finite validation loss"
    assert callback.history[3].values == callback.history[1].values
    assert "2 updates skipped" in callback.summary()
    assert callback.history[1].scalars()["hypergradient/skipped"] == 1.0
    assert "hypergradient/skipped" not in callback.history[0].scalars()
    assert all(torch.isfinite(torch.tensor(list(u.values.values()))).all() for u in callback.history)


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning's own, once per process
def test_training_step_that_returns_none_is_no_step_to_learn_from(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(Skips(), callback, tmp_path)
    assert all(u.skipped is None for u in callback.history)


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1, controller=Descent())
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        fit(Net(), callback, tmp_path)
        results.append((callback.hyperparameters, len(callback.history)))
    assert results[0] == results[1]


def test_a_controller_shared_by_two_callbacks_or_fits_is_not_shared_memory(tmp_path: Path) -> None:
    shared = Descent()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1, controller=shared)
        fit(Net(), callback, tmp_path)
        results.append(callback.hyperparameters)
    assert results[0] == results[1]
    assert shared.state_dict() == {}
