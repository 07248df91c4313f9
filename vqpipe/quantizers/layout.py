"""The order of the ids of an image, and ids that are left out.

Shapes: B images, N ids per image, h x w positions of a grid, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqpipe.errors import DataError


@dataclass(frozen=True)
class TokenLayout:
    """The order of the ids of an image: grids from coarse to fine, each row-major, groups of a position adjacent."""

    grids: tuple[tuple[int, int], ...]
    """(height, width) of each grid."""
    num_groups: int = 1
    """Ids per position."""

    @property
    def num_tokens(self) -> int:
        """Ids per image."""
        return sum(height * width for height, width in self.grids) * self.num_groups

    def split(self, ids: Tensor) -> list[Tensor]:
        """Split int64[B, num_tokens] into one int64[B, h, w, G] per grid, or codes [B, num_tokens, C] in the same way.

        Raises:
            DataError: there are not `num_tokens` ids per image.
        """
        if ids.ndim not in (2, 3) or ids.shape[1] != self.num_tokens:
            what, channels = ("ids", "") if ids.ndim != 3 else ("codes", ", channels")
            expected = f"[images, {self.num_tokens}{channels}] is expected"
            grids = " + ".join(f"{height} x {width}" for height, width in self.grids)
            groups = f" of {self.num_groups} groups each" if self.num_groups > 1 else ""
            hint = "Pass ids[None] for a single image" if ids.ndim == 1 else f"It has {grids} positions{groups}"
            raise DataError(f"{what} of shape {list(ids.shape)} where {expected}", hint)
        sizes = [height * width * self.num_groups for height, width in self.grids]
        parts = ids.split(sizes, dim=1)
        return [part.unflatten(1, (*grid, self.num_groups)) for part, grid in zip(parts, self.grids, strict=True)]

    def join(self, grids: Sequence[Tensor]) -> Tensor:
        """Join one int64[B, h, w, G] per grid into int64[B, num_tokens]; the inverse of `split`."""
        return torch.cat([grid.flatten(1) for grid in grids], dim=1)

    def to_table(self) -> dict[str, Any]:
        """The layout as a JSON-serializable dict."""
        return {"grids": [list(grid) for grid in self.grids], "num_groups": self.num_groups}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> TokenLayout:
        """The inverse of `to_table`."""
        return cls(tuple((int(height), int(width)) for height, width in table["grids"]), int(table["num_groups"]))


def keep_groups(ids: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """Set the ids of all but the first `groups` groups to -1, which decodes to the zero vector."""
    grids = [grid.clone() for grid in layout.split(ids)]
    for grid in grids:
        grid[..., groups:] = -1
    return layout.join(grids)


def check_negative(ids: Tensor, layout: TokenLayout) -> None:
    """Raise a DataError for negative ids of int64[B, N], except the -1 of groups or grids left out at the end."""
    if torch.compiler.is_compiling() or int(ids.min()) >= 0:  # a compiled graph cannot branch on values
        return
    grids = [grid.flatten(1, 2) for grid in layout.split(ids)]
    kept = torch.stack([(grid >= 0).all(dim=1) for grid in grids], dim=1)  # bool[B, grids, G]
    left_out = torch.stack([(grid == -1).all(dim=1) for grid in grids], dim=1)
    after_gap = (kept[:, :, 1:] & left_out[:, :, :-1]).any() or (kept[:, 1:] & left_out[:, :-1]).any()
    if after_gap or not (kept | left_out).all() or not kept[:, 0, 0].all():
        raise DataError(
            f"ids of {int(ids.min())}, which are not those of whole groups left out at the end",
            "Pass ids as `encode` returns them, and leave out groups with groups=",
        )
