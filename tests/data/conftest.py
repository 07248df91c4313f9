"""Fixtures: drawn images, and an index cache per test."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def draw() -> Callable[..., bytes]:
    """draw(number, (width, height), "PNG") -> an encoded image that differs by number and from pixel to pixel."""

    def draw(number: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
        noise = np.random.default_rng(number).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, kind)
        return file.getvalue()

    return draw
