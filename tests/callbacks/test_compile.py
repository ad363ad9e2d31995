"""Compiled networks: nothing is compiled anew from step to step, whoever looks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad import Estimator, Exact, FiniteDifference, Forward, Hold, NotDifferentiableError, Online
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


class Compiled(Net):
    """Counts how often its network is compiled: for training, for evaluation, with and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.compilations = 0

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            self.compilations += 1
            return graph.forward

        torch.compiler.reset()
        self.net = torch.compile(self.net, backend=backend)  # type: ignore[assignment]


def _compilations(tmp: Path, estimator: Estimator | None, epochs: int) -> int:
    module = Compiled()
    own = {"estimator": estimator, "controller": Hold(), "every_n_steps": 2}
    callbacks = [] if estimator is None else [HyperGradient(val_dataloaders=data(48, seed=2), **own)]
    trainer(tmp, callbacks=callbacks, max_epochs=epochs).fit(module, data(), data(seed=1))
    return module.compilations


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator", [Online(), Forward(curvature=FiniteDifference())], ids=["Online", "Forward, difference"]
)
def test_nothing_is_compiled_per_step(tmp_path: Path, estimator: Estimator) -> None:
    short, long = (_compilations(tmp_path, estimator, epochs) for epochs in (1, 4))
    assert short == long
    # One graph more at most: validation with gradients is neither training nor the Trainer's validation.
    assert long <= _compilations(tmp_path, None, 4) + 1


class Inductive(Net):
    """Compiled with a backward pass of its own, as the default backend does it."""

    def __init__(self) -> None:
        super().__init__()
        torch.compiler.reset()
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_second_derivative_is_refused_by_exact_and_served_by_differences(tmp_path: Path) -> None:
    own = {"controller": Hold(), "every_n_steps": 2, "val_dataloaders": data(48, seed=2)}
    difference = HyperGradient(estimator=Forward(curvature=FiniteDifference()), **own)
    trainer(tmp_path, callbacks=[difference], max_epochs=1).fit(Inductive(), data(), data(seed=1))
    assert len(difference.history) == 3
    exact = HyperGradient(estimator=Forward(curvature=Exact()), **own)
    with pytest.raises(NotDifferentiableError, match="FiniteDifference"):
        trainer(tmp_path, callbacks=[exact], max_epochs=1).fit(Inductive(), data(), data(seed=1))
