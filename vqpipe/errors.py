"""What can go wrong for a user, as one small tree.

    VqpipeError
    |-- ConfigError      a preset, a flag, or a combination of settings cannot be used
    |-- DataError        images, features or tokens given to us cannot be used
    |-- ArtifactError    an artifact is missing, damaged, in use, or was made with other settings
    |-- WeightsError     pretrained weights are absent or do not fit
    `-- NumericError     NaN or infinity where numbers were promised

Everything else is a bug of ours and keeps its traceback.

Each kind has a `cause`, a number of BSD's sysexits.h that says whose fault it is: for machines, in status.json. The
commands end with 1 for all of them.
"""


class VqpipeError(Exception):
    """An error we explain: what happened, and what to try next.

    `str(error)` is one line, "WHAT. TRY.", which the commands print after `error:`.
    """

    cause: int = 70
    """65 data, 66 absent, 70 software, 74 input or output, 75 try again, 76 artifact, 77 rights, 78 settings,
    79 numbers (beyond sysexits). An instance may know better than its class."""

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what.rstrip(". ")
        self.hint = hint.rstrip(". ")
        super().__init__(what, hint)

    def __str__(self) -> str:
        sentences = [part if part.endswith("?") else f"{part}." for part in (self.what, self.hint) if part]
        return " ".join(" ".join(sentences).split())


class ConfigError(VqpipeError):
    """A preset, a flag, or a combination of settings cannot be used."""

    cause = 78


class DataError(VqpipeError):
    """Images, features or tokens given to us cannot be used."""

    cause = 65


class ArtifactError(VqpipeError):
    """An artifact is missing, damaged, in use, or was made with other settings."""

    cause = 76


class WeightsError(VqpipeError):
    """Pretrained weights are absent or do not fit the network they were given to."""

    cause = 66


class NumericError(VqpipeError):
    """NaN or infinity where numbers were promised."""

    cause = 79
