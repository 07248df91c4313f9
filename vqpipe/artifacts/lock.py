"""One writer of a directory: a lock that the kernel frees when its process dies, with an owner and a heartbeat.

The file `.lock` names its owner, and is touched every half a minute. Neither decides anything: they tell whoever finds
the lock taken, by a machine that the kernel here may know nothing of, whom to ask and when he was last alive.
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
BEAT_SECONDS = 30.0


class Lock:
    """The lock of `folder`, in which `out` is written."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.file, self.out = folder / NAME, out
        self.handle: int | None = None
        self.heart: Heart | None = None

    @property
    def held(self) -> bool:
        """Whether this process is the writer."""
        return self.handle is not None

    def take(self) -> None:
        """Become the one writer.

        Raises:
            ArtifactError: another process is, and who; or the file system has no locks.
        """
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.taken(handle) from None
        except OSError as error:
            os.close(handle)
            raise ArtifactError(
                f"{self.file} cannot be locked ({error.strerror})",
                "Write to a file system with locks: without, two processes could write the same files",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now()}\n".encode())
        self.handle = handle
        self.heart = Heart(handle)
        self.heart.start()

    def taken(self, handle: int) -> ArtifactError:
        """Who has it, and when he was last alive."""
        owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        silence = timedelta(seconds=max(0, int(time.time() - os.fstat(handle).st_mtime)))
        os.close(handle)
        return ArtifactError(
            f"{self.out} is being written by {owner}, last alive {silence} ago",
            f"Wait for it, or stop it; where its machine is gone for good, delete {self.file}",
        )

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self.heart is not None:
            self.heart.stop()
        if self.handle is not None:
            os.close(self.handle)
        self.handle = self.heart = None


class Heart(threading.Thread):
    """Touches an open file every `BEAT_SECONDS`."""

    def __init__(self, handle: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.handle = handle
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            with suppress(OSError):  # the next file that is written will say it better
                os.utime(self.handle)

    def stop(self) -> None:
        """Returns when the file is touched no more."""
        self.stopped.set()
        self.join()
