"""A driver to be killed: runs a study in a process of its own.

`python -m tests.search.driving FOLDER TRIALS WORKERS SECONDS`: each trial counts its starts and its ends in its folder,
reports ten times within SECONDS, and continues at the step where it was, as a training with checkpoints does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hypergrad.search import Float, Study, Trial

SPACE = {"x": Float(-2.0, 2.0)}
STEPS = 10


def steady(trial: Trial, seconds: float = 1.0) -> float:
    progress = trial.folder / "progress"
    done = int(progress.read_text()) if progress.exists() else 0
    with (trial.folder / "starts").open("a") as file:
        file.write(f"{trial.attempt} {done}\n")
    for step in range(done + 1, STEPS + 1):
        time.sleep(seconds / STEPS)
        going_on = trial.report(trial.params["x"] ** 2 + 1 / step, step)
        temporary = trial.folder / "progress.tmp"
        temporary.write_text(str(step))
        temporary.replace(progress)
        if not going_on:
            return 0.0
    with (trial.folder / "ends").open("a") as file:
        file.write(f"{trial.attempt}\n")
    return float(trial.params["x"] ** 2)


def main(folder: str, trials: int, workers: int, seconds: float) -> None:
    study = Study(Path(folder), space=SPACE)
    print("ready", flush=True)
    study.run(lambda trial: steady(trial, seconds), trials, workers=workers, retries=100)
    print("done", len(study.trials), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
