"""The lock of a directory that is being written: at most one process writes an artifact.

The kernel releases it (flock) when its process ends, however it ends. The lock file also holds the owner's process,
host and start, and its modification time is a heartbeat: both only appear in the error of a second writer, who may be
on another machine.

The `filelock` package would replace only the call of flock: its kernel locks store no owner, fall back to lock files
that outlive their process where flock is missing, and belong to a path, while ours is renamed with its directory.
"""

import fcntl
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from vqpipe.errors import ArtifactError
from vqpipe.provenance import now

NAME = ".lock"
HEARTBEAT_SECONDS = 30.0


def owner(folder: Path) -> str:
    """The process that is writing in `folder`, as its lock file names it; empty if none is, or if that is unknown."""
    try:
        with (folder / NAME).open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).strip() or "another process"
    except OSError:
        return ""
    return ""


class Lock:
    """The lock of `folder`, in which the artifact `out` is written."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.file, self.out = folder / NAME, out
        self.handle: int | None = None
        self.released = threading.Event()

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self.handle is not None

    def acquire(self) -> None:
        """Take the lock, without waiting.

        Raises:
            ArtifactError: another process holds it (the message names it); or the file system has no locks.
        """
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.held_by_another(handle) from None
        except OSError as error:
            os.close(handle)
            raise ArtifactError(
                f"{self.file} cannot be locked ({error.strerror})",
                "Write to a file system with locks: without them, two processes could write the same files",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now()}\n".encode())
        self.handle = handle
        self.released.clear()
        self.heartbeat = threading.Thread(target=self.beat, args=(handle,), name="heartbeat", daemon=True)
        self.heartbeat.start()

    def beat(self, handle: int) -> None:
        """Update the modification time of the lock file until the lock is released."""
        while not self.released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the next write reports it
                os.utime(handle)

    def held_by_another(self, handle: int) -> ArtifactError:
        """The error that names the owner and the age of its last heartbeat."""
        owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        age = timedelta(seconds=max(0, int(time.time() - os.fstat(handle).st_mtime)))
        os.close(handle)
        return ArtifactError(
            f"{self.out} is being written by {owner}, last alive {age} ago",
            f"Wait for it, or stop it; if its machine is gone, delete {self.file}",
        )

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self.handle is not None:
            self.released.set()
            self.heartbeat.join()
            os.close(self.handle)
            self.handle = None
