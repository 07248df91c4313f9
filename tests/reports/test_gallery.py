"""Pictures of a page: which, in what order, how many, and what is said of the rest."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe.reports import gallery, page, pictures
from vqpipe.reports.evaluation import Shown


def shown(name: str, psnr: float | None, why: str = "spread", height: int = 8, width: int = 12) -> Shown:
    original = torch.full((3, height, width), 100, dtype=torch.uint8)
    original[:, height // 2, width // 2] = 200
    return Shown(name, pictures.to_png(original), pictures.to_png(original + 10), psnr, why)  # type: ignore[arg-type]


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_worst_come_lowest_first_and_best_highest_first_in_sections_of_their_own() -> None:
    given = [shown("a", 20.0), shown("b", 9.5, "worst"), shown("c", 8.25, "worst"), shown("d", None, "best")]
    sections = gallery.galleries([*given, shown("e", 31.0, "best"), shown("f", 33.0, "best")])
    assert all(isinstance(section, page.Pictures) for section in sections)
    named = {section.title: [each.name for each in section.pictures] for section in sections}  # type: ignore[attr-defined]
    assert named == {
        "Originals and reconstructions": ["a"],
        "The worst images": ["c", "b"],
        "The best images": ["d", "f", "e"],
    }
    assert [each.note for each in sections[2].pictures] == ["", "33.0 dB", "31.0 dB"]  # type: ignore[attr-defined]


def test_a_triple_holds_the_very_pixels_and_their_error() -> None:
    (triple,) = gallery.triples_of([shown("a", 20.0)])
    assert [version.label for version in triple.versions] == ["reconstruction", "error"]
    assert (pixels(triple.versions[0].uri).astype(int) - pixels(triple.original) == 10).all()
    assert len(np.unique(pixels(triple.versions[1].uri).reshape(-1, 3), axis=0)) == 1  # 10 everywhere
    assert triple.size == (12, 8)


def test_pictures_beyond_the_room_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [shown(str(i), 20.0) for i in range(4)]
    (section,) = gallery.galleries(given)
    assert "beside it" not in section.caption  # type: ignore[attr-defined]
    size = sum(len(base64.b64decode(each.original.partition(",")[2])) for each in section.pictures)  # type: ignore[attr-defined]
    size += sum(
        len(base64.b64decode(v.uri.partition(",")[2]))
        for each in section.pictures  # type: ignore[attr-defined]
        for v in each.versions
    )
    room = gallery.Room(size * 3 // 4)
    assert [each.name for each in gallery.triples_of(given, room)] == ["0", "1", "2"]
    assert room.note().startswith("1 more would make this file too large")


def test_of_a_large_picture_the_middle_is_shown_at_full_resolution() -> None:
    (triple,) = gallery.triples_of([shown("large", 20.0, height=16, width=1500)])
    assert triple.size == (1024, 16)
    assert triple.note == "20.0 dB, the middle 1024 x 16 of 1500 x 16 pixels; PSNR of the whole"
    assert (pixels(triple.original)[8, 512] == 200).all()
