"""Float16 with a GradScaler: steps that it skips are no steps here either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from hypergrad import ActivationPattern, Estimator, FiniteDifference, Forward, Hold, Online, Race, Unrolled
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


class Counts(Net):
    """Counts the updates that really happen."""

    def configure_optimizers(self) -> Any:
        self.updates = 0
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)
        optimizer.register_step_post_hook(self.count)
        return optimizer

    def count(self, *_: Any) -> None:
        self.updates += 1


def _fit(
    callback: HyperGradient | None, scale: float, kind: type[Counts] = Counts, **options: Any
) -> tuple[Counts, Any]:
    torch.manual_seed(0)
    module = kind()
    # Halves until float16 can hold the gradients, and skips a step each time.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-6)
    callbacks = [] if callback is None else [callback]
    fitted = trainer(None, callbacks=callbacks, plugins=MixedPrecision("16-mixed", "cpu", scaler), **options)
    fitted.fit(module, data(), data(seed=1))
    return module, fitted


@pytest.mark.parametrize("estimator", [Online(), Forward(), Unrolled(4)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_skipped_steps_are_skipped_here_too(estimator: Estimator, options: dict[str, Any]) -> None:
    callback = HyperGradient(estimator=estimator, controller=Hold(), every_n_steps=1, val_dataloaders=data(seed=2))
    plain, _ = _fit(None, 2.0**36, **options)
    module, fitted = _fit(callback, 2.0**36, **options)
    skipped = fitted.global_step - module.updates
    assert skipped >= 2
    assert [u.step for u in callback.history] == list(range(1, module.updates + 1))
    assert all(u.skipped is None for u in callback.history)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    # As in a run whose scale is right from the start, on the batches that this one has stepped on.
    assert all(u.hypergradients["lr"] != 0.0 for u in callback.history)


def test_the_pieces_of_a_step_are_found_again_beside_a_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pieces(Counts):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    found = list[bool]()
    hold = ActivationPattern.hold
    monkeypatch.setattr(ActivationPattern, "hold", lambda *args: found.append(hold(*args)) or found[-1])
    callback = HyperGradient(
        estimator=Forward(1.0, FiniteDifference()), controller=Hold(), val_dataloaders=data(seed=2)
    )
    _fit(callback, 2.0**10, Pieces)
    assert len(found) >= 5
    assert all(found)


class Unhooked(Counts):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def test_a_race_through_skipped_steps() -> None:
    race = Race(rates=(1e-3, 1e-1), rungs=((0.1, 2), (0.2, 1)), forks=(), least=1)
    callback = HyperGradient("lr", controller=Hold(), every_n_steps=10**6, val_dataloaders=data(seed=2), race=race)
    module, fitted = _fit(callback, 2.0**36, Unhooked, max_epochs=10)
    assert fitted.precision_plugin.scaler.get_scale() <= 2.0**24  # two steps were skipped
    assert callback.race is not None
    assert all(len(rung) == n for rung, n in zip(callback.race["scores"], (3, 2), strict=True))
    assert all(p.isfinite().all() for p in module.parameters())
