"""`vqpipe reconstruct`: images of any size are reconstructed at that size, whole or in tiles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.metrics
import torch
import typer
from PIL import Image

from stages.reconstruct import reconstruct
from vqpipe.artifacts import open_artifact
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.evaluation import image_files
from vqpipe.evaluation.image_files import find_files, png_names
from vqpipe.planning import tiles
from vqpipe.tokenizer import Tokenizer

MULTI_GROUP = {"kind": "multi_group", "num_groups": 3, "group": {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
RESIDUAL = {"kind": "residual", "depth": 3, "codebook_size": 64, "code_dim": 4}


def draw(file: Path, height: int = 32, width: int = 32) -> np.ndarray:
    """Write an image of noise; return its pixels, uint8[H, W, 3]."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def test_only_the_first_files_are_reconstructed_with_a_limit(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name in "cab":
        draw(tmp_path / "photos" / f"{name}.png")
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer("tokenizer"), "out": tmp_path / "out", "device": "cpu"}
    reconstruct([tmp_path / "photos"], **options, limit=2)
    assert list(open_artifact(tmp_path / "out").facts["psnr"]) == ["a.png", "b.png"]
    with pytest.raises(ArtifactError, match=r"was made with other files: a\.png, b\.png, not c\.png"):
        reconstruct([tmp_path / "photos" / "c.png"], **options)


def test_files_of_any_size_are_published_beside_their_reconstructions(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    files, pixels = [], []
    for folder, (height, width) in (("a", (33, 50)), ("b", (32, 32))):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "photo.png")
        pixels.append(draw(files[-1], height, width))
    path = tiny_tokenizer("tokenizer")
    reconstruct(files, tokenizer=path, out=tmp_path / "out", device="cpu")

    published = open_artifact(tmp_path / "out", "images")
    pngs = ["photo-2.png", "photo.png"]
    folders = ("originals", "reconstructions")
    assert published.names() == sorted(
        ["report.html", *pngs, *(f"{folder}/{png}" for folder in folders for png in pngs)]
    )
    first, second = (np.asarray(Image.open(published.file(name))) for name in ("photo.png", "photo-2.png"))
    assert first.shape == (33, 50 + 4 + 50, 3)
    assert np.array_equal(first[:, :50], pixels[0])
    tokenizer = Tokenizer.from_pretrained(path)
    square = torch.from_numpy(pixels[1]).permute(2, 0, 1)[None]
    reconstruction = tokenizer.decode(tokenizer.encode(square), (32, 32))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(second[:, 36:], reconstruction)
    alone = [np.asarray(Image.open(published.file(f"{folder}/photo-2.png"))) for folder in folders]
    assert np.array_equal(alone[0], pixels[1])
    assert np.array_equal(alone[1], reconstruction)
    error = np.mean((pixels[1].astype(float) - reconstruction) ** 2)
    assert published.facts["psnr"]["photo-2.png"] == pytest.approx(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("quantizer", [MULTI_GROUP, RESIDUAL], ids=["multi_group", "residual"])
def test_groups_decodes_the_first_groups_only(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, quantizer: dict[str, Any]
) -> None:
    path, file = tiny_tokenizer("tokenizer", quantizer=quantizer), tmp_path / "photo.png"
    pixels = draw(file)
    tokenizer, square = Tokenizer.from_pretrained(path), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for groups in (1, 2, 3):
        reconstruct([file], tokenizer=path, out=tmp_path / f"first-{groups}", groups=str(groups), device="cpu")
        shown = np.asarray(Image.open(tmp_path / f"first-{groups}" / "photo.png"))[:, 36:]
        reconstruction = tokenizer.decode(tokenizer.encode(square), (32, 32), groups=groups)
        assert np.array_equal(shown, reconstruction[0].permute(1, 2, 0).numpy())
    with pytest.raises(DataError, match="groups = 4, the tokenizer has 3"):
        reconstruct([file], tokenizer=path, out=tmp_path / "out", groups="1,4", device="cpu")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("quantizer", [MULTI_GROUP, RESIDUAL], ids=["multi_group", "residual"])
def test_several_numbers_of_groups_give_a_labelled_contact_sheet(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, quantizer: dict[str, Any]
) -> None:
    path, file = tiny_tokenizer("tokenizer", quantizer=quantizer), tmp_path / "photo.png"
    pixels = draw(file, 48, 160)
    reconstruct([file], tokenizer=path, out=tmp_path / "out", groups="1, 2,3", device="cpu")
    published = open_artifact(tmp_path / "out", "images")
    assert published.manifest.config["groups"] == [1, 2, 3]
    sheet = np.asarray(Image.open(published.file("photo.png")))
    labels, columns = sheet[:-48], [sheet[-48:, start : start + 160] for start in range(0, 4 * 164, 164)]
    assert sheet.shape[1] == 4 * 164 - 4
    assert np.array_equal(columns[0], pixels)
    tokenizer, square = Tokenizer.from_pretrained(path), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for k in (1, 2, 3):
        reconstruction = tokenizer.decode(tokenizer.encode(square), (48, 160), groups=k)
        assert np.array_equal(columns[k], reconstruction[0].permute(1, 2, 0).numpy())
        error = np.mean((pixels.astype(float) - columns[k]) ** 2)
        assert published.facts["psnr"]["photo.png"][k - 1] == pytest.approx(10 * np.log10(255**2 / error))
    texts = [labels[:, start : start + 160] for start in range(0, 4 * 164, 164)]
    assert all(text.min() < 100 for text in texts)  # each column has one
    assert len({text.tobytes() for text in texts}) == 4
    names = published.names("reconstructions/*")
    assert names == [f"reconstructions/photo-groups-{k}.png" for k in (1, 2, 3)]
    alone = np.asarray(Image.open(published.file("reconstructions/photo-groups-2.png")))
    assert np.array_equal(alone, columns[2])
    html = published.file("report.html").read_text(encoding="utf-8")
    labels = ("first group", "first 2 groups", "first 3 groups")
    assert [html.count(f'data-label="{label}"') for label in labels] == [1, 1, 1]


def test_psnr_and_ssim_are_printed_and_shown_on_a_page_with_sliders(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    pixels = [draw(folder / "one.png"), draw(folder / "below" / "two.png", 40, 24), draw(folder / ".hidden.png")]
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    reconstruct([folder], tokenizer=tiny_tokenizer("tokenizer"), out=tmp_path / "out", device="cpu")
    published = open_artifact(tmp_path / "out", "images")
    assert list(published.facts["psnr"]) == ["two.png", "one.png"]
    again = np.asarray(Image.open(published.file("reconstructions/one.png")))
    ssim = skimage.metrics.structural_similarity(
        *(pixels[0], again), channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert published.facts["ssim"]["one.png"] == pytest.approx(ssim, abs=0.02)  # it pads the borders
    html, said = published.file("report.html").read_text(encoding="utf-8"), capsys.readouterr().err
    assert "<h1>tokenizer on 2 images</h1>" in html
    assert html.count('class="card"') == 2
    means = [sum(published.facts[key].values()) / 2 for key in ("psnr", "ssim")]
    row = next(line for line in said.splitlines() if "mean of 2" in line)
    assert row.split()[-2:] == [f"{means[0]:.2f}", f"{means[1]:.3f}"]
    assert f"<td>{means[0]:.2f}</td>" in html


def test_the_number_of_images_in_a_mean_is_stated(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in (32, 40, 8):  # SSIM is defined from 11 pixels
        draw(tmp_path / f"{side}.png", side, side)
    files = [tmp_path / f"{side}.png" for side in (32, 40, 8)]
    reconstruct(files, tokenizer=tiny_tokenizer("tokenizer"), out=tmp_path / "out", device="cpu")
    html = open_artifact(tmp_path / "out").file("report.html").read_text(encoding="utf-8")
    assert (html.count("mean over 3 images"), html.count("mean over 2 of 3 images")) == (1, 1)
    row = next(line for line in capsys.readouterr().err.splitlines() if "mean of 3" in line)
    assert row.rstrip().endswith("(of 2)")
    assert row.count("(of") == 1


def test_ssim_and_psnr_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)
    pair[1, :, :35] = pair[0, :, :35] ^ 1  # the last chunk of 5 rows is much noisier
    whole = image_files.ssim_between(*pair)
    monkeypatch.setattr(image_files, "ROWS_PER_CHUNK", 7)
    assert image_files.ssim_between(*pair) == pytest.approx(whole)
    expected = skimage.metrics.peak_signal_noise_ratio(*(image.numpy() for image in pair))
    assert image_files.psnr_between(*pair) == pytest.approx(expected)
    assert image_files.ssim_between(*pair[..., :10]) is None


def test_patterns_are_expanded_and_one_without_a_match_is_reported(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.jpg"):
        draw(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert [file.name for file in find_files([tmp_path / "*.png", tmp_path / "c.jpg"])] == ["a.png", "b.png", "c.jpg"]
    with pytest.raises(DataError, match=r"\*\.gif matches no file"):
        find_files([tmp_path / "*.gif"])
    with pytest.raises(DataError, match="empty has no image files"):
        find_files([tmp_path / "empty"])


def test_files_of_systems_in_a_folder_are_ignored_and_links_to_folders_are_followed_once(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "__MACOSX", photos / "@eaDir", photos / "a", photos / "a-b", elsewhere):
        folder.mkdir(parents=True)
    for file in ("x.jpg", "a/2.png", "a-b/1.png", "../elsewhere/3.png", "@eaDir/x.jpg", "__MACOSX/y.jpg"):
        draw(photos / file)
    (photos / "__MACOSX" / "._x.jpg").write_bytes(b"no picture")
    (photos / "link").symlink_to(elsewhere)
    (photos / "link" / "up").symlink_to(photos)
    reconstruct([photos], tokenizer=tiny_tokenizer("tokenizer"), out=tmp_path / "out", device="cpu")
    assert list(open_artifact(tmp_path / "out").facts["psnr"]) == ["2.png", "1.png", "3.png", "x.png"]


def test_shared_norms_is_an_option_and_recorded(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    path, file = tiny_tokenizer("tokenizer"), tmp_path / "photo.png"
    draw(file, 64, 64)
    options: dict[str, Any] = {"tokenizer": path, "tile": 32, "overlap": 8, "device": "cpu"}
    reconstruct([file], out=tmp_path / "own", **options)
    reconstruct([file], out=tmp_path / "shared", shared_norms=True, **options)
    own, shared = (open_artifact(tmp_path / name, "images") for name in ("own", "shared"))
    assert "shared_norms" not in own.manifest.config
    assert shared.manifest.config["shared_norms"] is True
    pixels = [np.asarray(Image.open(each.file("photo.png"))) for each in (own, shared)]
    assert not np.array_equal(*pixels)


def test_tiles_that_do_not_fit_the_memory_are_refused_with_a_tile_that_does(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tiny_tokenizer("tokenizer"), tmp_path / "photo.png"
    draw(file, 200, 200)
    tokenizer = Tokenizer.from_pretrained(path)
    beside = tiles.image_bytes(200, 200, 200, 1)
    room = int(tiles.MARGIN * tiles.tile_bytes(tokenizer, 128, 128)) + beside + 1
    monkeypatch.setattr(tiles, "available_bytes", lambda: room)
    options: dict[str, Any] = {"tokenizer": path, "out": tmp_path / "out", "overlap": 8, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"out of memory: a tile of 200 pixels needs about .* Use --tile 128"):
        reconstruct([file], tile=2400, **options)
    assert not (tmp_path / "out.partial").exists()
    reconstruct([file], tile=128, **options)
    monkeypatch.setattr(tiles, "available_bytes", lambda: beside)
    with pytest.raises(ConfigError, match="Use a machine with more memory"):
        reconstruct([file], tile=128, **(options | {"out": tmp_path / "other"}))


@pytest.mark.parametrize("groups", ["0", "1,", "two", "1,-2"])
def test_invalid_numbers_of_groups_are_wrong_usage(groups: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="is not a number of groups, or several separated by commas"):
        reconstruct([], tokenizer=tmp_path, out=tmp_path / "out", groups=groups, device="cpu")


def test_continuous_autoencoder_is_accepted_without_groups(tiny_vae: Path, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    draw(file, 33, 50)
    reconstruct([file], tokenizer=tiny_vae, out=tmp_path / "out", device="cpu")
    assert np.asarray(Image.open(tmp_path / "out" / "photo.png")).shape == (33, 50 + 4 + 50, 3)
    with pytest.raises(DataError, match="tiny-vae has continuous latents"):
        reconstruct([file], tokenizer=tiny_vae, out=tmp_path / "other", groups="1", device="cpu")


def test_tile_and_overlap_options(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = tiny_tokenizer("tokenizer"), tmp_path / "photo.png"
    pixels = draw(file, 40, 64)
    reconstruct([file], tokenizer=path, out=tmp_path / "out", tile=32, overlap=0, device="cpu")
    assert "in tiles: 1 of 1 image, 4 tiles of up to 32 x 32 pixels" in capsys.readouterr().err
    reconstruct([file], tokenizer=path, out=tmp_path / "whole", device="cpu")
    assert "in tiles" not in capsys.readouterr().err
    published = open_artifact(tmp_path / "out", "images")
    assert (published.manifest.config["tile"], published.manifest.config["overlap"]) == (32, 0)
    shown = np.asarray(Image.open(published.file("photo.png")))[:, 68:]
    tokenizer, corner = Tokenizer.from_pretrained(path), torch.from_numpy(pixels[:32, :32].copy()).permute(2, 0, 1)
    reconstruction = tokenizer.decode(tokenizer.encode(corner[None]), (32, 32))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shown[:8, :32], reconstruction[:8])  # rows below are blended with the second row of tiles
    with pytest.raises(ConfigError, match="an overlap of 64 pixels does not fit tiles of 32"):
        reconstruct([file], tokenizer=path, out=tmp_path / "other", tile=32, device="cpu", overlap=64)
    assert not (tmp_path / "other.partial").exists()


def test_unreadable_and_absent_files_are_reported(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_tokenizer("tokenizer")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        reconstruct([broken], tokenizer=path, out=tmp_path / "out", device="cpu")
    with pytest.raises(DataError, match="is not a file"):
        reconstruct([tmp_path / "absent.png"], tokenizer=path, out=tmp_path / "other", device="cpu")


def test_names_are_unique(tmp_path: Path) -> None:
    files = [tmp_path / text for text in ("a/x.jpg", "b/x.png", "x-2.jpg", "c/x.webp", ".hidden.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    names = list(png_names(files))
    assert len(names) == 5
    assert names[0] == "x.png"
    assert not any(name.startswith(".") for name in names)


def test_files_of_long_and_of_similar_names_are_all_reconstructed(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    long = "\u00e4" * 117 + "b"  # 235 bytes
    files = [tmp_path / f"{name}.png" for name in ("a", "originals__a", long, f"{long}c")]
    for file in files:
        draw(file)
    reconstruct(files, tokenizer=tiny_tokenizer("tokenizer"), out=tmp_path / "out", device="cpu")
    short = "\u00e4" * 60
    names = ["a.png", "originals__a.png", f"{short}.png", f"{short}-2.png"]
    folders = ("", "originals/", "reconstructions/")
    published = open_artifact(tmp_path / "out")
    assert set(published.names("*.png")) == {folder + name for folder in folders for name in names}
