"""Whatever dies, every trial ends in one true state, nothing finished runs again, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypergrad.search import Float, StorageError, Study, Trial, TrialRecord
from tests.search.driving import SPACE, steady
from tests.search.objectives import attempts_before, die, kept_server, square

ROOT = Path(__file__).parents[2]
Drive = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    """Starts drivers, and leaves none behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:

        def start(trials: int, workers: int, seconds: float) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.search.driving", str(tmp_path / "s")]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            child = subprocess.Popen(
                [*command, *map(str, (trials, workers, seconds))], cwd=ROOT, env=environment, **pipes
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def _until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def _trial_processes(folder: Path) -> list[int]:
    """Trials that are running now, whoever started them; named by what they hold open."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(folder) in os.readlink(entry / "fd" / "1"):
                found.append(int(entry.name))
    return found


def _assert_nothing_lost(records: list[TrialRecord], trials: int) -> None:
    assert [r.number for r in records] == list(range(trials))
    for record in records:
        assert record.state == "complete", record
        assert record.value == pytest.approx(record.params["x"] ** 2)
        assert sorted(record.curve) == list(range(1, 11))
        assert len((record.folder / "ends").read_text().split()) == 1, "ran again although it had finished"
        starts = [list(map(int, line.split())) for line in (record.folder / "starts").read_text().splitlines()]
        assert [attempt for attempt, _ in starts] == sorted({attempt for attempt, _ in starts}), "an attempt ran twice"
        assert [done for _, done in starts] == sorted(done for _, done in starts), "steps were lost"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("kill", "killed by SIGKILL"),
        ("exception", "ValueError: as asked for"),
        ("exit", "its process exited with code 3"),
        ("out of memory", "CUDA out of memory: CUDA out of memory. Tried"),
    ],
)
def test_a_trial_that_dies_is_failed_or_continued(tmp_path: Path, how: str, reason: str) -> None:
    def train(trial: Trial) -> float:
        if attempts_before(trial) < 2 * trial.number:  # trial 0 never dies, trial 1 twice, trial 2 four times
            die(how)
        return square(trial)

    records = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}).run(train, 3, workers=2, retries=2)
    assert [r.state for r in records] == ["complete", "complete", "failed"]
    assert [r.attempts for r in records] == [1, 3, 3]
    assert records[0].failures == ()
    assert len(records[1].failures) == 2
    assert str(records[2].reason).startswith(reason)
    assert all(failure.startswith(reason) for failure in records[1].failures + records[2].failures)
    if how == "exception":
        assert 'raise ValueError("as asked for")' in (records[2].folder / "log.txt").read_text()


def test_a_hang_is_killed_with_everything_it_started(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.attempt == 1:
            child = subprocess.Popen(["sleep", "600"])
            (trial.folder / "child").write_text(str(child.pid))
            die("hang")
        return 1.0

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, retries=1, trial_timeout=1.0)
    assert record.state == "complete"
    assert record.failures == ("no end within trial_timeout=1 s",)
    child = int((record.folder / "child").read_text())
    status = Path(f"/proc/{child}/status")
    _until(lambda: not status.exists() or "State:\tZ" in status.read_text(), 5.0)  # a zombie is dead


def test_the_death_of_the_fork_server_costs_one_attempt(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.attempt == 1:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return 1.0

    before = kept_server()
    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, retries=1)
    assert record.state == "complete"
    assert "the process that starts trials died (killed by SIGKILL" in record.failures[0]
    assert kept_server() is not before


def test_ctrl_c_once_stops_cleanly_and_the_study_can_be_resumed(tmp_path: Path) -> None:
    import threading

    study = Study(tmp_path / "s", space=SPACE)

    def press() -> None:
        _until(lambda: len(list((tmp_path / "s").glob("trial-*/starts"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    records = study.run(lambda trial: steady(trial, 2.0), 4, workers=2)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert [r.state for r in records] == ["waiting", "waiting"]
    assert all(r.failures == ("Ctrl-C",) for r in records)
    assert _trial_processes(tmp_path) == []
    _assert_nothing_lost(study.resume(lambda trial: steady(trial, 0.1), workers=2), 4)


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    import threading

    def press() -> None:
        _until(lambda: list((tmp_path / "s").glob("trial-*/marks/*")))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    def hangs(trial: Trial) -> float:
        if attempts_before(trial) == 0:
            die("hang")
        return 0.0

    thread = threading.Thread(target=press)
    thread.start()
    study = Study(tmp_path / "s", space=SPACE)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        study.run(hangs, 1)
    thread.join()
    assert time.monotonic() - began < 30
    assert [r.state for r in study.trials] == ["waiting"]
    assert _trial_processes(tmp_path) == []
    assert [r.state for r in study.resume(hangs)] == ["complete"]


def test_the_end_of_the_timeout_leaves_trials_to_be_resumed(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    records = study.run(lambda trial: steady(trial, 4.0), 3, workers=2, timeout=1.0)
    assert [r.state for r in records] == ["waiting", "waiting"]
    assert "the timeout of 1 s is over" in records[0].failures[0]
    _assert_nothing_lost(study.resume(lambda trial: steady(trial, 0.1), workers=2), 3)


def test_a_driver_killed_twice_and_its_workers_killed_meanwhile(tmp_path: Path, drive: Drive) -> None:
    _kill_and_resume(tmp_path / "s", drive, trials=6, seconds=1.0, drivers=2, workers=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_five_drivers_and_twenty_workers_killed_at_random(tmp_path: Path, drive: Drive, seed: int) -> None:
    _kill_and_resume(tmp_path / "s", drive, trials=24, seconds=2.0, drivers=5, workers=20, seed=seed)


def _kill_and_resume(
    folder: Path, drive: Drive, trials: int, seconds: float, drivers: int, workers: int, seed: int
) -> None:
    """Kill workers and drivers at random times while they run; then let the last driver finish."""
    chance = random.Random(seed)
    killed = 0
    for _ in range(drivers):
        child = drive(trials, 2, seconds)
        until = killed + workers // drivers
        while killed < until:
            _until(lambda: _trial_processes(folder) or child.poll() is not None)
            assert child.poll() is None, "the driver ended before its workers were killed"
            time.sleep(chance.uniform(0.0, seconds))
            for pid in _trial_processes(folder)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        assert child.poll() is None, "the driver ended before it was killed: nothing was tested"
        _until(lambda: _trial_processes(folder))
        child.kill()
        child.wait()
        # Its workers go with it, so that none of them writes into a folder that the next driver has given away.
        _until(lambda: not _trial_processes(folder), 10.0)
    assert killed == workers
    records = Study(folder).resume(lambda trial: steady(trial, 0.1), workers=2, retries=100)
    _assert_nothing_lost(records, trials)
    assert sum(r.attempts for r in records) > trials


def test_two_drivers_do_not_run_one_study(tmp_path: Path, drive: Drive) -> None:
    child = drive(4, 1, 5.0)
    _until(lambda: _trial_processes(tmp_path / "s"))
    study = Study(tmp_path / "s")
    assert "running" in [r.state for r in study.trials]  # looking is possible meanwhile
    with pytest.raises(StorageError, match=f"being run by another process \\(pid {child.pid}\\)"):
        study.run(square, 4)


def test_a_result_that_the_driver_did_not_live_to_record_is_not_computed_again(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    (record,) = study.run(lambda trial: steady(trial, 0.1), 1)
    # As the storage would be had the driver been killed before it wrote the end.
    number = study._storage.create()
    study._storage.set_params(number, {"x": 1.5})
    study._storage.begin(number)
    (tmp_path / "s" / "trial-0001").mkdir()
    result = (record.folder / "result.json").read_text().replace(str(record.value), "2.25")
    (tmp_path / "s" / "trial-0001" / "result.json").write_text(result)
    records = study.run(lambda trial: steady(trial, 0.1), 2)
    assert (records[1].state, records[1].value, records[1].attempts) == ("complete", 2.25, 1)
    assert not (records[1].folder / "starts").exists()


def test_a_driver_killed_between_creating_a_trial_and_drawing_its_point(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    study._storage.create()
    records = study.run(square, 2)
    undisturbed = Study(tmp_path / "t", space=SPACE).run(square, 2)
    assert [r.params for r in records] == [r.params for r in undisturbed]


def test_a_write_ahead_file_that_is_cut_off_costs_the_last_transactions_at_most(tmp_path: Path, drive: Drive) -> None:
    folder = tmp_path / "s"
    child = drive(4, 1, 0.5)
    _until(lambda: (folder / "trial-0002" / "starts").exists())
    child.kill()
    child.wait()
    journal = folder / "study.db-wal"
    content = journal.read_bytes()
    assert len(content) > 4096
    journal.write_bytes(content[: len(content) * 9 // 10 + 7])
    _until(lambda: not _trial_processes(folder), 10.0)
    records = Study(folder, space=SPACE).run(lambda trial: steady(trial, 0.1), 4)
    assert [r.state for r in records] == ["complete"] * 4
    assert [r.number for r in records] == [0, 1, 2, 3]
    for record in records:  # what had ended is not run again, even if its end was among what was lost
        assert len((record.folder / "ends").read_text().split()) == 1
        assert record.value == pytest.approx(record.params["x"] ** 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_study_and_costs_nothing_that_was_finished(small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    def train(trial: Trial) -> float:
        if trial.number == 2 and not (trial.folder / "once").exists():
            (trial.folder / "once").touch()
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(b"0" * 4096)
                    file.flush()
        for step in range(40):
            trial.report(1.0, step)
        return square(trial)

    study = Study(small_disk / "s", space=SPACE)
    with pytest.raises(StorageError, match="full"):
        study.run(train, 4)
    finished = [r for r in study.trials if r.finished]
    assert len(finished) >= 2
    ballast.unlink()
    records = Study(small_disk / "s").resume(train)
    assert [r.state for r in records] == ["complete"] * 4
    assert records[: len(finished)] == finished
