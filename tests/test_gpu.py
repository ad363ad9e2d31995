"""The same promises on a CUDA device, and that the hot path does not wait for it. Run with `make gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad import Hold, Online, Race, Readout, hypergradient
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, Stateful, data, trainer
from tests.hypergrad.cells import ACCEPTED, Cell, Problem, ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("cell", "name"), ACCEPTED, ids=ids(ACCEPTED))
@pytest.mark.parametrize("closed_forms", [True, False])
def test_online_equals_the_cpu(cell: Cell, name: str, closed_forms: bool) -> None:
    problem = Problem(cell)
    estimator = Online(closed_forms=closed_forms)
    results = []
    for device in ("cpu", "cuda"):
        model = problem.model().to(device)
        optimizer = problem.optimizer(model)

        def on_device(step: int, device: str = device) -> Any:
            loss = problem.loss(step)
            return lambda m: loss(_OnHost(m, device))

        losses = [on_device(i) for i in range(problem.steps)]
        results.append(hypergradient(model, optimizer, losses, on_device(problem.steps), [name], estimator).grads[name])
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-8)


class _OnHost(torch.nn.Module):
    """A model on a device that takes and returns host tensors."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.device)).cpu()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_kernel_variants(options: dict[str, bool]) -> None:
    model = torch.nn.Linear(4, 4).cuda()
    x = torch.randn(8, 4, device="cuda")
    loss = lambda m: m(x).square().mean()
    names = ["lr", "weight_decay", "betas[0]"]
    a, b = (
        hypergradient(model, torch.optim.AdamW(model.parameters(), lr=1e-2, **o), [loss] * 3, loss, names)
        for o in (options, {})
    )
    torch.testing.assert_close(a.grads, b.grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fit_learns_and_hold_is_bit_identical(tmp_path: Path, precision: Any) -> None:
    def fit(callbacks: list[Any]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = Stateful(lr=1e-4)
        trainer(tmp_path, callbacks=callbacks, accelerator="gpu", devices=1, precision=precision).fit(
            module, data(), data(seed=1)
        )
        return {k: v.cpu() for k, v in module.state_dict().items()}

    hold = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2, controller=Hold())
    torch.testing.assert_close(fit([hold]), fit([]), rtol=0, atol=0)
    assert all(u.skipped is None for u in hold.history)
    learns = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit([learns])
    assert learns.hyperparameters["lr"] != 1e-4


def test_recurrent_networks_have_a_validation_gradient_despite_cudnn(tmp_path: Path) -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = torch.nn.LSTM(5, 8, batch_first=True), torch.nn.Linear(8, 3)

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.head(self.rnn(batch[0][:, None])[0][:, 0]), batch[1])

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    trainer(tmp_path, callbacks=[callback], accelerator="gpu", devices=1).fit(Recurrent(), data(), data(seed=1))
    assert all(u.hypergradients["lr"] != 0.0 for u in callback.history)


def test_the_race_takes_its_arms_to_the_host_where_the_device_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        torch.cuda.reset_peak_memory_stats()
        module = Stateful(lr=1e-4)
        module.wide = torch.nn.Linear(2000, 2000)
        callback = HyperGradient(val_dataloaders=data(seed=2), controller=Hold(), race=Race(least=1), readout=Readout())
        trainer(tmp_path, callbacks=[callback], accelerator="gpu", devices=1, max_epochs=40).fit(module, data(), data())
        return {k: v.cpu() for k, v in module.state_dict().items()}, torch.cuda.max_memory_allocated()

    on_device, peak = fit()
    monkeypatch.setattr("hypergrad.callbacks._race.room", lambda _: 0.0)
    on_host, lower = fit()
    torch.testing.assert_close(on_host, on_device, rtol=0, atol=0)
    assert lower < peak - 5 * 4 * 2000**2  # five arms at least, of 16 MB each


class _Synchronisations:
    """Counts operations that make the host wait for the device."""

    def __enter__(self) -> _Synchronisations:
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lr", [1e-3, 1e-6], ids=["closed forms", "forward AD"])
def test_one_synchronisation_per_update_and_none_per_step(lr: float, recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    from hypergrad import Tuner, resolve
    from hypergrad.callbacks._attachment import Attachment

    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    attachment = Attachment(0, optimizer, resolve(optimizer, ("lr", "weight_decay")), Online(), {}, Tuner(Hold()), 2)
    x = torch.randn(4, 16, device="cuda")
    for _ in range(4):  # the first steps create state
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    gradients = {p: torch.ones_like(p) for p in model.parameters()}
    with warnings.catch_warnings(record=True) as seen, _Synchronisations():
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        attachment.tracker.contract(gradients)
        assert [w for w in seen if "synchroniz" in str(w.message)] == []
