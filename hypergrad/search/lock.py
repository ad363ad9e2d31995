"""One driver per study."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from hypergrad.search.errors import StorageError


class Lock:
    """Held while a study runs; the system releases it when the process ends, however that happens.

    Raises:
        StorageError: on entering, if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "study.lock"
        self._fd: int | None = None

    def __enter__(self) -> Lock:
        import fcntl  # POSIX; so is everything that runs a study

        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 100).decode() or "unknown"
            os.close(fd)
            raise StorageError(
                f"{self._path.parent} is being run by another process (pid {holder}): wait for it, or end it."
            ) from error
        self._fd = fd
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
