"""A damaged storage is told as such: nothing is missing from what it says, and no other error comes out of it."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hypergrad.search import Float, StorageError, Study, TrialRecord

SPACE = {"x": Float(-2.0, 2.0)}
PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[TrialRecord]]:
    folder = tmp_path_factory.mktemp("whole") / "s"
    study = Study(folder, space=SPACE)
    for number in range(8):
        assert study._storage.create() == number
        study._storage.set_params(number, {"x": 1.5})
        study._storage.begin(number)
        for step in range(20):
            study._storage.report(number, step, 1.0)
        study._storage.finish(number, "complete", [2.25], metrics={"val_loss": 2.25})
    records = study.trials
    study._storage.close()
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return (folder / "study.db").read_bytes(), records


def _cut(whole: bytes) -> Iterator[bytes]:
    chance = random.Random(0)
    for length in [15, 16, 100, PAGE, len(whole) - PAGE, len(whole) - 1, *chance.sample(range(len(whole)), 20)]:
        yield whole[:length]


def _zeroed(whole: bytes) -> Iterator[bytes]:
    for place in range(0, len(whole), PAGE):
        yield whole[:place] + bytes(PAGE) + whole[place + PAGE :]


def _overwritten(whole: bytes) -> Iterator[bytes]:
    settings = whole.index(b'"version"')  # of the study, as JSON
    for garbage in (b"\xff\xfe\xfd", b"{{{"):
        yield whole[:settings] + garbage + whole[settings + 3 :]
    chance = random.Random(1)
    for place in range(0, len(whole), PAGE):
        start = place + chance.randrange(PAGE // 2)
        yield whole[:start] + chance.randbytes(PAGE // 2) + whole[start + PAGE // 2 :]


@pytest.mark.parametrize("damage", [_cut, _zeroed])
def test_lost_pages_are_told_and_no_trial_is_missing(
    tmp_path: Path, whole: tuple[bytes, list[TrialRecord]], damage: Callable[[bytes], Iterator[bytes]]
) -> None:
    content, records = whole
    assert [(r.number, r.state) for r in _opened(tmp_path / "good", content)] == [(n, "complete") for n in range(8)]
    assert [r.curve for r in _opened(tmp_path / "good", content)] == [r.curve for r in records]
    for i, damaged in enumerate(damage(content)):
        with pytest.raises(StorageError, match="The file is damaged"):
            _opened(tmp_path / str(i), damaged)


def test_nothing_but_a_storage_error_comes_out_of_garbage(
    tmp_path: Path, whole: tuple[bytes, list[TrialRecord]]
) -> None:
    told = 0
    for i, damaged in enumerate(_overwritten(whole[0])):
        try:
            _opened(tmp_path / str(i), damaged)
        except StorageError:
            told += 1
    assert told >= 5


def test_an_emptied_storage_is_not_taken_for_a_new_study(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    study._storage.close()
    for leftover in (tmp_path / "s").glob("study.db*"):
        leftover.unlink()
    (tmp_path / "s" / "study.db").touch()
    (tmp_path / "s" / "trial-0000").mkdir()
    with pytest.raises(StorageError, match=r"study.db is empty, but there are trials .*The file is damaged"):
        Study(tmp_path / "s", space=SPACE)
    (tmp_path / "s" / "trial-0000").rmdir()
    assert Study(tmp_path / "s", space=SPACE).trials == []  # killed right after the file was made


def _opened(folder: Path, content: bytes) -> list[TrialRecord]:
    folder.mkdir(exist_ok=True)
    (folder / "study.db").write_bytes(content)
    study = Study(folder)
    records = study.trials
    study._storage.close()
    return records
