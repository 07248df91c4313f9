"""The launches of the search on a GPU (`screening`): sizes that follow from shapes alone, without Triton.

Letters as in `screening`.
"""

from dataclasses import dataclass

ROWS_AT_ONCE = 2**18
"""Vectors per launch; their candidates take 64 MB."""
CAPACITY = 32
"""Candidates per vector and split. A vector with more is compared with every code of that split."""
SHORT = 64
"""Dimensions up to which a candidate is a whole tile."""


@dataclass(frozen=True)
class Blocking:
    """The block sizes of a launch, which depend on the shapes only."""

    padded: int
    """P: D rounded up to a multiple of `chunk`."""
    chunk: int
    """Dimensions per product."""
    rows: int
    """Vectors per program."""
    tile: int
    """Codes per tile."""
    candidate_size: int
    """Codes per candidate: `tile`, or 1."""
    splits: int
    """S."""

    @staticmethod
    def of(groups: int, vectors: int, codes: int, dim: int, processors: int) -> "Blocking":
        """The blocking for G x N vectors of D dimensions on a GPU with `processors` multiprocessors."""
        chunk = next(size for size in (16, 32, 64) if dim <= size or size == 64)
        short = dim <= SHORT
        rows, tile = 64 if short else 128, 128
        programs = groups * -(-vectors // rows)
        wanted = power_of_2(-(-2 * processors // programs))
        splits = min(wanted, 16, power_of_2(-(-codes // (8 * tile))))
        return Blocking(-(-dim // chunk) * chunk, chunk, rows, tile, tile if short else 1, splits)


def power_of_2(number: int) -> int:
    """The lowest power of 2 that is at least `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
