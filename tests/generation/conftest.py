"""Small spaces and seeded random number generators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqpipe.generation import Space
from vqpipe.quantizers import TokenLayout


@pytest.fixture(scope="session")
def make_space() -> Callable[..., Space]:
    """`make_space(height, width, groups, ...)`: by default 13 codes of 4 channels, 5 classes, 4 x 4 positions."""

    def make(height: int = 4, width: int = 4, groups: int = 1, **sizes: Any) -> Space:
        defaults = {"codebook_size": 13, "latent_dim": 4 * groups, "code_dim": 4, "num_classes": 5}
        return Space(layout=TokenLayout(((height, width),), groups), **{**defaults, **sizes})

    return make


@pytest.fixture(scope="session")
def rngs() -> Callable[..., list[torch.Generator]]:
    """`rngs(7, 8)`: generators with these seeds."""
    return lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
