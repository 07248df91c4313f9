"""What went wrong with an artifact, for machines: `<out>.partial/status.json`; and what a disk says, in our words.

    {"error": the line the user saw, "cause": a number of `errors.VqpipeError.cause`, "rank": who had it}

It holds the first error of the first rank that failed: under torchrun the exit code is 1 whatever happened, and the
ranks that fail after the first only say that another has ended. The next run of the command takes it away.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vqpipe import distributed
from vqpipe.errors import ArtifactError, VqpipeError

NAME = "status.json"
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE)
"""What a disk may answer where we write; any other OSError is not about the file that is being written."""
HINTS = {
    errno.EDQUOT: "Your quota is used up: free some of it and run the same command again",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "Raise the limit on open files (ulimit -n) and run the same command again",
}


def note_failure(folder: Path, error: Exception) -> None:
    """Keep `error` in the folder's status.json, if it is the first. Never raises: the error itself matters more."""
    line = str(error) if isinstance(error, VqpipeError) else f"{type(error).__name__}: {error}"
    rank = distributed.rank()
    table = {"error": " ".join(line.split()), "cause": cause_of(error), "rank": rank}
    temporary = folder / f".writing-{rank}-{NAME}"
    with suppress(OSError, ValueError):
        try:
            temporary.write_text(json.dumps(table) + "\n", encoding="utf-8")
            os.link(temporary, folder / NAME)  # unlike a rename it does not replace what an earlier rank has put there
        finally:
            temporary.unlink(missing_ok=True)


def forget_failure(folder: Path) -> None:
    """Take an earlier run's status away."""
    (folder / NAME).unlink(missing_ok=True)


def is_status(name: str) -> bool:
    """Whether a file of that name is a status, or was to become one."""
    return name == NAME or (name.startswith(".writing-") and name.endswith(f"-{NAME}"))


def cause_of(error: BaseException) -> int:
    """The number of what went wrong."""
    if isinstance(error, VqpipeError):
        return error.cause
    if isinstance(error, OSError):
        return 77 if error.errno in FORBIDDEN else 66 if error.errno == errno.ENOENT else 74
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist")):
        return 75  # another rank ended; it should have its own error
    return 70


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What a disk answers while `target` is written in here, as an ArtifactError in one line that says what is free.

    numpy and safetensors do not pass on the number of the error. An OSError about another file stays as it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not concerns(error, target):
            raise
        number = error.errno if isinstance(error, OSError) else None
        elsewhere = number in (*FORBIDDEN, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
        failure = ArtifactError(
            f"cannot write {target}: {reason(error)}{room(target) if number in (*FULL, None) else ''}",
            "Choose another --out" if elsewhere else HINTS.get(number or 0, MAKE_ROOM),
        )
        failure.cause = 77 if number in FORBIDDEN else 74
        raise failure from None


MAKE_ROOM = "What is finished is kept: make room or mend the disk, and run the same command again"


def concerns(error: Exception, target: Path) -> bool:
    """Whether an error is about writing `target`."""
    if not isinstance(error, OSError):
        return True
    if error.filename is not None and isinstance(error.filename, (str, bytes)):
        named = Path(os.fsdecode(error.filename))
        if not (named.is_relative_to(target.parent) or target.is_relative_to(named)):
            return False
    if error.errno is None:
        return "written" in str(error)  # numpy: "8192 requested and 4080 written"
    return error.errno in (*FORBIDDEN, *FULL, *BROKEN)


def reason(error: Exception) -> str:
    """Why, in a few words."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error)).split()) or type(error).__name__


def room(target: Path) -> str:
    """What the disk below `target` has left."""
    with suppress(OSError):
        return f" ({shutil.disk_usage(target.parent).free / 1e6:,.1f} MB are free)"
    return ""
