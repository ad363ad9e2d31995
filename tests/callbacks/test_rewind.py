"""A run that blows up, relapses or stands still goes back, and no other does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hypergrad import Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, Reseed, Resumable, Saves, continuing, data, trainer
from tests.callbacks.one_run import EPOCHS, fit, seeded, tuner


class Explodes(Net):
    """A schedule with a mistake in it: for a while the learning rate is absurd."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        mistake = LambdaLR(optimizer, lambda step: 1e6 if 60 <= step < 63 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": mistake, "interval": "step"}}


@pytest.mark.parametrize("readout", [Readout(checkpoints=20), None], ids=["with readout", "alone"])
def test_a_run_that_blows_up_goes_back(readout: Readout | None) -> None:
    module, plain = Explodes(), Explodes()
    fit(plain, None)
    callback = tuner(every_n_steps=1, readout=readout, rewind=Rewind())
    with pytest.warns(UserWarning, match="The weights are those of step"):
        fit(module, callback)
    start, end = callback.rewound[0]
    assert 60 <= start <= 66
    assert 48 <= end <= 60
    untrained, loss, broken = (
        torch.stack([m.loss(b) for b in data(seed=2)]).mean() for m in (seeded(Explodes()), module, plain)
    )
    assert loss < 0.6 * untrained
    assert not broken < untrained
    assert "went back" in callback.report()


class Forgets(Net):
    """Its weights are as at first again after the 60th of 120 steps, or the 30th: a learning rate that is too high."""

    at, validation = 60, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.at:
            seeded(self)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch) + self.validation * (self.trainer.global_step > 60))


@pytest.mark.parametrize(("at", "back"), [(60, 54), (30, 0)], ids=["late", "while there is time to begin anew"])
def test_a_run_that_relapses_goes_back(at: int, back: int) -> None:
    module = Forgets(lr=0.03)
    module.at = at
    callback = tuner(readout=Readout(checkpoints=20), rewind=Rewind())
    with pytest.warns(UserWarning, match="The weights are those of step"):
        fit(module, callback)
    start, end = callback.rewound[0]
    assert at < start <= at + 18
    assert end == back if back == 0 else back - 18 <= end <= back
    assert callback.hyperparameters["lr"] <= 0.03 / 3 * (1 + 1e-6)


@pytest.mark.filterwarnings("ignore:.*The weights are those of step")
@pytest.mark.parametrize(("at", "goes_back"), [(30, True), (-1, False)])
def test_a_run_that_relapses_before_the_validation_loss_has_gained_anything(at: int, goes_back: bool) -> None:
    class Blind(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (0 <= at <= self.trainer.global_step)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_loss", self.loss(batch) * 0.0 + 1.0)

    callback = tuner(readout=Readout(checkpoints=20), rewind=Rewind())
    fit(Blind(lr=0.03), callback)
    assert [to for _, to in callback.rewound] == [0] * goes_back
    assert all(at < start <= at + 18 for start, _ in callback.rewound)


@pytest.mark.filterwarnings("ignore:.*The weights are those of step")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["explodes", "forgets late", "forgets early"])
def test_from_a_checkpoint_right_after_going_back(tmp_path: Path, kind: str, first: bool) -> None:
    def run(resume: Path | None = None) -> tuple[dict[str, Any], HyperGradient]:
        module = Explodes() if kind == "explodes" else Forgets(lr=0.03)
        module.at = 60 if kind == "forgets late" else 30
        often = {"every_n_steps": 1} if kind == "explodes" else {}
        callback = tuner(**often, readout=Readout(checkpoints=20), rewind=Rewind())
        savers = [Saves("on_train_batch_end", tmp_path)] if resume is None else []
        callbacks = [Reseed(), *savers, callback] if first else [Reseed(), callback, *savers]
        fitted = trainer(None, callbacks=callbacks, max_epochs=EPOCHS)
        fitted.fit(seeded(module), Resumable(), data(seed=1), **continuing(resume))
        return module.state_dict(), callback

    weights, whole = run()
    at, to = whole.rewound[0]
    assert (to == 0) == (kind == "forgets early")
    again, resumed = run(tmp_path / f"{at}.ckpt")
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    assert resumed.rewound == whole.rewound
    assert resumed.hyperparameters == whole.hyperparameters
    assert resumed.ended_with == whole.ended_with


def test_a_run_that_overfits_does_not_go_back() -> None:
    module = Forgets(lr=0.03)
    module.at, module.validation = (
        -1,
        0.5,
    )  # the validation loss loses all that it had gained, the training loss nothing
    callback = tuner(readout=Readout(checkpoints=20), rewind=Rewind())
    fit(module, callback)
    raw = [raw for _, raw, _ in callback._run._pieces.readings]
    assert Rewind().has_relapsed(raw[-1], first=raw[0], best=min(raw))
    assert callback.rewound == []


def test_a_run_that_stands_still_begins_anew_with_a_smaller_rate() -> None:
    class Stands(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * 0.0 + 1.0

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_loss", self.loss(batch) * 0.0 + 1.0)

    module = Stands("SGD", lr=0.03)
    callback = tuner(readout=Readout(checkpoints=20), rewind=Rewind())
    with pytest.warns(UserWarning, match="The weights are those of step 0 again"):
        fit(module, callback)
    assert callback.rewound == [(24, 0), (48, 0)]  # later there is no time to begin anew
