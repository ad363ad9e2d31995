"""What the outer loop costs, and the same work under Optuna's own loop.

- overhead: trivial trials on two workers against plain calls, start of a worker, memory of the driver.
- peers: the same network, points and pruner under Optuna's `study.optimize` with threads, and here.

Run: `.venv/bin/python examples/benchmarks/search.py` (a few minutes on 2 cores).
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad.search import Float, Int, Local, Study, Trial
from hypergrad.search.seeding import derived_seed, seed_everything

SPACE = {"x": Float(-2.0, 2.0), "n": Int(1, 64, log=True)}


def trivial(trial: Trial) -> dict[str, float]:
    """Returns the objective, and the time at which the worker had got as far as this."""
    return {"val_loss": trial.params["x"] ** 2, "began": time.time() % 1e6}


def megabytes() -> float:
    """Resident memory of this process now, not at its peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def overhead(folder: Path, trials: int, more: int) -> None:
    """Seconds per trial, and megabytes."""
    study = Study(folder / "trivial", space=SPACE)
    began = time.perf_counter()
    study.run(trivial, 2, workers=2)
    print(f"first 2 trials, with the start of the fork server   {time.perf_counter() - began:8.2f} s")
    began = time.perf_counter()
    study.run(trivial, 2 + trials, workers=2)
    each = (time.perf_counter() - began) / trials
    print(f"{trials} trivial trials on 2 workers, each              {each:8.3f} s")
    starts = [_started(study, r.number) for r in study.trials[2:]]
    print(
        f"from the driver's decision to `train`, median (max)  {statistics.median(starts):7.3f} s ({max(starts):.3f})"
    )
    before, said = megabytes(), []
    for count in range(1, 6):
        study.run(trivial, 2 + trials + more * count // 5, workers=2)
        said.append(f"{megabytes() - before:+.1f}")
    print(f"memory of the driver over {more} further trials, fifths  {', '.join(said)} MB on {before:.0f}")


def _started(study: Study, number: int) -> float:
    (attempt,) = study._storage.attributes(number)["attempts"]
    return float(study.trials[number].metrics["began"] - attempt["began"] % 1e6)


class Net(L.LightningModule):
    """A perceptron of the searched width and learning rate."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    from sklearn.datasets import load_digits

    from hypergrad import split

    x, y = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, val = split(dataset, (0.75, 0.25), stratify=y)
    return DataLoader(train, 64, shuffle=True), DataLoader(val, len(val))


class OptunaPruning(L.Callback):
    """What Optuna's integration does: report at the end of a validation, raise if the pruner says so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.trial.report(trainer.callback_metrics["val_loss"].item(), trainer.current_epoch + 1)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def peers(folder: Path, trials: int, epochs: int, seed: int) -> None:
    """The same points, seeds and pruner; one after the other, and two at a time."""
    space = {"width": Int(8, 256, log=True), "lr": Float(1e-4, 1e-1, log=True)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}

    def here(trial: Trial) -> Any:
        trainer = trial.trainer(max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(Net(**trial.params), *digits())
        return trainer.callback_metrics["val_loss"]

    points: list[dict[str, Any]] = []
    for workers in (1, 2):
        study = Study(folder / f"here-{workers}", space=space, pruner=("asha", {"reduction_factor": 3}), seed=seed)
        began = time.perf_counter()
        study.run(here, trials, execution=Local(workers, threads=1, preload=["sklearn.datasets"]))
        _line(f"hypergrad, {workers} at a time", began, study.best.value, [r.state == "pruned" for r in study.trials])
        points = [dict(r.params) for r in study.trials]
    seeds = {tuple(p.values()): i for i, p in enumerate(points)}

    def there(trial: optuna.Trial) -> float:
        params = {
            "width": trial.suggest_int("width", 8, 256, log=True),
            "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        }
        seed_everything(derived_seed(seed, seeds[tuple(params.values())]))  # the same weights and batches as here
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[OptunaPruning(trial)],
            default_root_dir=folder / "there",
            enable_checkpointing=False,
            **quiet,
        )
        trainer.fit(Net(**params), *digits())
        return trainer.callback_metrics["val_loss"].item()

    torch.set_num_threads(1)
    for workers in (1, 2):
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        study = optuna.create_study(storage=f"sqlite:///{folder / f'there-{workers}.db'}", pruner=pruner)
        for point in points:
            study.enqueue_trial(point)
        began = time.perf_counter()
        try:
            study.optimize(there, trials, n_jobs=workers)
        except ValueError as error:  # seen with two threads and SQLite: "Cannot tell a COMPLETE trial."
            print(f"Optuna, {workers} thread(s): {error}")
            continue
        _line(f"Optuna, {workers} thread(s)", began, study.best_value, [t.state.name == "PRUNED" for t in study.trials])


def _line(name: str, began: float, best: Any, pruned: list[bool]) -> None:
    seconds = time.perf_counter() - began
    print(f"{name:28}{seconds:8.1f} s   best val_loss {best:.4f}   {sum(pruned)} of {len(pruned)} pruned", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="trivial trials")
    parser.add_argument("--more", type=int, default=500, help="further trivial trials, for the memory")
    parser.add_argument("--peer-trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        overhead(Path(folder), arguments.trials, arguments.more)
        for seed in range(arguments.seeds):
            print(f"digits, {arguments.peer_trials} trials of up to {arguments.epochs} epochs, seed {seed}")
            (Path(folder) / str(seed)).mkdir()
            peers(Path(folder) / str(seed), arguments.peer_trials, arguments.epochs, seed)


if __name__ == "__main__":
    main()
