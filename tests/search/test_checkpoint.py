"""Damage to a real checkpoint, anywhere in it, is noticed before a trial is continued from it."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from hypergrad.search.checkpoint import FOLDER, Checkpoint
from tests.callbacks.modules import Net, data

Content = dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fit")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(Net(lr=0.1), data(), data(seed=1))
    trainer.save_checkpoint(folder / "last.ckpt")
    return (folder / "last.ckpt").read_bytes()


def _flipped(whole: bytes) -> Iterator[bytes]:
    """One byte changed: every one of the directory at the end, and some of the records before it."""
    chance = random.Random(0)
    directory = whole.index(b"PK\1\2")
    for place in [*range(directory, len(whole)), *chance.sample(range(directory), 300)]:
        yield whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
    for place in range(directory, len(whole)):
        yield whole[:place] + bytes([chance.randrange(256)]) + whole[place + 1 :]


def _cut(whole: bytes) -> Iterator[bytes]:
    chance = random.Random(1)
    for place in [0, 1, 21, 22, len(whole) - 1, *chance.sample(range(len(whole)), 100)]:
        yield whole[:place]


def _overwritten(whole: bytes) -> Iterator[bytes]:
    """As of a disk that gave back another block."""
    chance = random.Random(2)
    for _ in range(200):
        place, length = chance.randrange(len(whole)), chance.choice([8, 64, 512])
        yield whole[:place] + chance.randbytes(length) + whole[place + length :]


def _content(path: Path) -> Content:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.mark.parametrize("damage", [_flipped, _cut, _overwritten])
def test_no_damage_raises_and_none_that_changes_the_content_passes(
    tmp_path: Path, whole: bytes, damage: Callable[[bytes], Iterator[bytes]]
) -> None:
    path = tmp_path / FOLDER / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(whole)
    assert Checkpoint(tmp_path).usable(marked=False) == path
    content, accepted, refused = _content(path), 0, 0
    for damaged in damage(whole):
        path.write_bytes(damaged)
        checkpoint = Checkpoint(tmp_path)
        if checkpoint.usable(marked=False) is None:
            assert checkpoint.unusable == f"{path} is damaged"
            refused += 1
        else:  # a date, an alignment: nothing that is read
            assert _content(path) == content
            accepted += 1
    assert refused > 100
    assert accepted == 0 or damage is not _cut


def test_what_torch_writes_passes_however_much_it_is(tmp_path: Path) -> None:
    path = tmp_path / FOLDER / "last.ckpt"
    path.parent.mkdir()
    for content in ({}, {"rng": torch.get_rng_state(), "many": [torch.zeros(1) for _ in range(300)]}):
        torch.save(content, path)
        assert Checkpoint(tmp_path).usable(marked=False) == path
