"""The errors that a user can cause or meet, as one small tree.

    VqpipeError
    |-- ConfigError      a preset, a flag, or a combination of settings cannot be used
    |-- DataError        images, features or tokens cannot be used
    |-- ArtifactError    an artifact is missing, damaged, in use, or was made with other settings
    |-- WeightsError     pretrained weights are absent or do not fit
    `-- NumericError     NaN or infinity

Any other exception is a bug and keeps its traceback.

Each class has a `sysexit_code`, a number of BSD's sysexits.h, which status.json stores as `cause` for scripts. The exit
code of a command is 1 for all of them.
"""

import unicodedata


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes, as of file names, escaped for a terminal."""
    return "".join(
        letter
        if letter.isprintable() or unicodedata.category(letter) == "Zs"
        else f"\\x{ord(letter) - 0xDC00:02x}"
        if "\udc80" <= letter <= "\udcff"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


class VqpipeError(Exception):
    """An error with an explanation: what happened, and what to try next.

    `str(error)` is one line, "WHAT. TRY.", which the commands print after `error:`.
    """

    sysexit_code: int = 70
    """65 data, 66 absent, 70 software, 74 input or output, 75 try again, 76 artifact, 77 permissions, 78 settings,
    79 numbers (not in sysexits.h). An instance may override that of its class."""

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what.rstrip(". ")
        self.hint = hint.rstrip(". ")
        super().__init__(what, hint)

    def __str__(self) -> str:
        sentences = [part if part.endswith("?") else f"{part}." for part in (self.what, self.hint) if part]
        return printable(" ".join(" ".join(sentences).split()))


class ConfigError(VqpipeError):
    """A preset, a flag, or a combination of settings cannot be used."""

    sysexit_code = 78


class DataError(VqpipeError):
    """Images, features or tokens cannot be used."""

    sysexit_code = 65


class ArtifactError(VqpipeError):
    """An artifact is missing, damaged, in use, or was made with other settings."""

    sysexit_code = 76


class WeightsError(VqpipeError):
    """Pretrained weights are absent or do not fit the network."""

    sysexit_code = 66


class NumericError(VqpipeError):
    """NaN or infinity."""

    sysexit_code = 79
