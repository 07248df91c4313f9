"""Kill a process at its n-th file operation, so that a test can try every moment of a write.

    crash.arm(7, folder)                                   # in a forked process
    [sys.executable, *crash.command(7, folder, "train", ...)]   # `vqpipe train ...` in a process of its own

Only operations below `folder` count. In order of execution:

    open     before a file is opened for writing (it is truncated, or absent, afterwards)
    torn     a file that is about to be flushed, cut to half its size
    fsync    before a file or a directory is flushed
    rename   before a file or a directory is renamed
    link, unlink, mkdir, rmdir    before these

The product code is not changed for this: opens, renames and deletions are seen by an audit hook, flushes and the files
that safetensors writes by patches of `os.fsync` and `safetensors.torch.serialize_file`.
"""

import os
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch

EVENTS = {"os.rename": "rename", "os.link": "link", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
"""Audit event -> its name here. Its first argument is a path; of the last three, the last a directory handle."""


class Crash:
    """Counts file operations below `folder`, and sends this process a signal at the `number`-th that matches.

    `only` restricts the count to operations "EVENT PATTERN", such as "rename *.parquet"; the pattern is matched with
    the path (of a rename: the source).
    """

    def __init__(self, number: int, folder: Path, only: str = "* *", kind: signal.Signals = signal.SIGKILL) -> None:
        self.left, self.folder, self.kind = number, os.path.realpath(folder), kind
        self.event, self.pattern = only.split(" ", 1)
        self.process = os.getpid()

    def matches(self, event: str, path: str) -> bool:
        return (
            os.getpid() == self.process
            and Path(path).is_relative_to(self.folder)
            and fnmatch(event, self.event)
            and fnmatch(path, self.pattern)
        )

    def point(self, event: str, path: str, tear: bool = False) -> None:
        """Count one operation; at the last one, cut the file if `tear`, and send the signal."""
        if not self.matches(event, path):
            return
        self.left -= 1
        if self.left == 0:
            if tear:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(self.process, self.kind)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: `sys.addaudithook`."""
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                self.point("open", absolute(args[0]))
        elif event in EVENTS:
            self.point(EVENTS[event], absolute(args[0], args[-1] if len(args) in (2, 3) else -1))

    def fsync(self, handle: int) -> None:
        """Replaces `os.fsync`."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path):
            self.point("torn", path, tear=True)
        self.point("fsync", path)
        self.flush(handle)

    def serialize(self, tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        """Replaces `serialize_file` of safetensors, which opens its file in Rust."""
        self.point("open", absolute(filename))
        self.serialize_file(tensors, filename, *args, **options)

    def arm(self) -> None:
        """Begin to count. There is no way back: audit hooks stay until the process ends."""
        self.flush, os.fsync = os.fsync, self.fsync
        self.serialize_file, safetensors.torch.serialize_file = safetensors.torch.serialize_file, self.serialize
        sys.addaudithook(self.audit)


def absolute(path: Any, folder: int = -1) -> str:
    """A path as the kernel finds it: relative to the directory handle `folder`, or to the working directory."""
    parent = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
    path = os.path.join(parent, os.fsdecode(path))
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def arm(number: int, folder: Path, only: str = "* *", kind: signal.Signals = signal.SIGKILL) -> None:
    """Let this process die at its `number`-th file operation below `folder`."""
    Crash(number, folder, only, kind).arm()


def command(number: int, folder: Path, *words: str, only: str = "* *") -> list[str]:
    """The arguments for Python, or for torchrun, that run `vqpipe WORDS` until it dies."""
    return [__file__, str(number), str(folder), only, *words]


def main() -> None:
    number, folder, only, *sys.argv[1:] = sys.argv[1:]
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    arm(int(number), Path(folder), only)
    from stages import cli

    cli.main()


if __name__ == "__main__":
    main()
