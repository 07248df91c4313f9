"""`vqpipe reconstruct`: images of any size come back at that size, whole or in tiles."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.reconstruct import any_size, png_names, ramp, reconstruct, spans
from vqpipe.artifacts import open_artifact
from vqpipe.errors import DataError
from vqpipe.tokenizer import Tokenizer

MULTI_GROUP = {"kind": "multi_group", "num_groups": 3, "group": {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
RESIDUAL = {"kind": "residual", "depth": 3, "codebook_size": 64, "code_dim": 4}


class Identity:
    """Stands in for a tokenizer that loses nothing, and notes which sizes went through it."""

    downsample_factor = 8

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def encode(self, images: Tensor) -> Tensor:
        self.images = images
        self.seen.append((images.shape[2], images.shape[3]))
        assert images.shape[2] % 8 == images.shape[3] % 8 == 0
        return images

    def decode(self, ids: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        assert ids.shape[2:] == image_size
        return ids


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 121), (3, 200), (40, 16), (170, 131)])
def test_padding_tiling_and_blending_undo_themselves(height: int, width: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    lossless = Identity()
    assert torch.equal(any_size(lossless, image, tile=64, overlap=16), image)  # type: ignore[arg-type]
    assert max(max(size) for size in lossless.seen) <= 64


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 16), (72, 64, 16), (520, 64, 16), (8, 64, 63)])
def test_tiles_cover_everything_and_share_the_overlap(length: int, tile: int, overlap: int) -> None:
    pieces = list(spans(length, tile, overlap))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    for (_, stop), (start, _) in pairwise(pieces):
        assert stop - start >= overlap
    assert all(stop - start == min(tile, length) for start, stop in pieces)


def test_a_seam_fades_linearly() -> None:
    assert torch.allclose(ramp(8, overlap=3), torch.tensor([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]))


def test_files_of_any_size_are_published_beside_their_reconstruction(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    files, pixels = [], []
    for folder, (height, width) in (("a", (33, 50)), ("b", (32, 32))):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "photo.png")
        pixels.append(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
        Image.fromarray(pixels[-1]).save(files[-1])
    path = tiny_tokenizer("tokenizer")
    reconstruct(files, tokenizer=path, out=tmp_path / "out", device="cpu")

    published = open_artifact(tmp_path / "out", "images")
    assert published.names() == ["photo-2.png", "photo.png"]
    first, second = (np.asarray(Image.open(published.file(name))) for name in ("photo.png", "photo-2.png"))
    assert first.shape == (33, 50 + 4 + 50, 3)
    assert np.array_equal(first[:, :50], pixels[0])
    tokenizer = Tokenizer.from_pretrained(path)
    square = torch.from_numpy(pixels[1]).permute(2, 0, 1)[None]
    again = tokenizer.decode(tokenizer.encode(square), (32, 32))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(second[:, 36:], again)
    error = np.mean((pixels[1].astype(float) - again) ** 2)
    assert published.facts["psnr"]["photo-2.png"] == pytest.approx(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("quantizer", [MULTI_GROUP, RESIDUAL], ids=["multi_group", "residual"])
def test_the_first_groups_alone_give_a_coarser_picture(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, quantizer: dict[str, Any]
) -> None:
    path, file = tiny_tokenizer("tokenizer", quantizer=quantizer), tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    tokenizer, square = Tokenizer.from_pretrained(path), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for groups in (1, 2, 3):
        reconstruct([file], tokenizer=path, out=tmp_path / f"first-{groups}", groups=groups, device="cpu")
        shown = np.asarray(Image.open(tmp_path / f"first-{groups}" / "photo.png"))[:, 36:]
        again = tokenizer.decode(tokenizer.encode(square), (32, 32), groups=groups)
        assert np.array_equal(shown, again[0].permute(1, 2, 0).numpy())
    with pytest.raises(DataError, match="groups = 4, the tokenizer has 3"):
        reconstruct([file], tokenizer=path, out=tmp_path / "out", groups=4, device="cpu")
    assert not (tmp_path / "out.partial").exists()


def test_a_continuous_autoencoder_reconstructs_too_but_has_no_groups(tiny_vae: Path, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)).save(file)
    reconstruct([file], tokenizer=tiny_vae, out=tmp_path / "out", device="cpu")
    assert np.asarray(Image.open(tmp_path / "out" / "photo.png")).shape == (33, 50 + 4 + 50, 3)
    with pytest.raises(DataError, match="tiny-vae has continuous latents"):
        reconstruct([file], tokenizer=tiny_vae, out=tmp_path / "other", groups=1, device="cpu")


def test_what_is_no_picture_or_no_file_is_named(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_tokenizer("tokenizer")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        reconstruct([broken], tokenizer=path, out=tmp_path / "out", device="cpu")
    with pytest.raises(DataError, match="is not a file"):
        reconstruct([tmp_path / "absent.png"], tokenizer=path, out=tmp_path / "other", device="cpu")


def test_names_stay_apart() -> None:
    names = png_names([Path(text) for text in ("a/x.jpg", "b/x.png", "x-2.jpg", "c/x.webp", ".hidden.png")])
    assert len(set(names)) == 5
    assert names[0] == "x.png"
    assert not any(name.startswith(".") for name in names)
