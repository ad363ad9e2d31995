"""The checkpoint that a trial is continued from, and what keeps it from failing on the same one for ever."""

from __future__ import annotations

import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

FOLDER = "checkpoints"
_END = struct.Struct("<4s6sH10s")  # of an archive without a comment, as torch writes it


class Checkpoint:
    """The last checkpoint in a folder.

    Whoever takes it leaves a mark, which goes once the training has been restored. If an attempt raises while the mark
    is there, it was the checkpoint that could not be restored: the file is whole, but no checkpoint, or that of another
    model or version. It is put aside. An attempt that was killed or lacked memory says nothing about it.

    Args:
        folder: of the trial, or of a fold.
    """

    def __init__(self, folder: Path) -> None:
        place = folder / FOLDER
        self._path, self._mark, self._aside = place / "last.ckpt", place / "restoring", place / "unusable.ckpt"
        self.unusable: str | None = None

    def usable(self, *, marked: bool) -> Path | None:
        """The file to continue from; None to begin anew, with `unusable` saying why if there is a file."""
        if self._path.exists():
            if _is_whole(self._path):
                if marked:
                    with suppress(OSError):
                        self._mark.touch()
                return self._path
            self.unusable = f"{self._path} is damaged"
        elif self._aside.exists():
            self.unusable = f"an earlier attempt could not be continued from {self._aside}"
        return None

    def restored(self) -> None:
        """The training is under way."""
        with suppress(OSError):
            self._mark.unlink(missing_ok=True)

    def raised(self) -> None:
        """The attempt has raised an exception."""
        if self._mark.exists():
            with suppress(OSError):
                os.replace(self._path, self._aside)
            self.restored()


def raised_in(folder: Path) -> None:
    """An attempt at the trial in `folder`, with the folds that are in it, has raised an exception."""
    for place in (folder, *folder.glob("fold-*")):
        Checkpoint(place).raised()


def _is_whole(path: Path) -> bool:
    """Whether torch can be expected to read it: a zip archive with all its records, each with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # By entry: `testzip` goes by name, and misses a record whose name has become that of another.
            return min(len(records), 0xFFFF) == _declared(path) and all(
                _is_sound(archive, record) for record in records
            )
    except Exception:  # a damaged header raises whatever the bytes that it names happen to lead to
        return False


def _is_sound(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    with archive.open(record) as content:
        while content.read(1 << 20):
            pass
    return True  # or else it has raised


def _declared(path: Path) -> int:
    """How many records the end of the archive says that there are: a damaged length may swallow some of them."""
    with path.open("rb") as file:
        file.seek(-_END.size, os.SEEK_END)
        magic, _, total, _ = _END.unpack(file.read())
    return int(total) if magic == b"PK\5\6" else -1
