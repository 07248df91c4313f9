"""`vqpipe tokenize` as a function."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stages.detokenize import detokenize
from stages.tokenize_images import tokenize
from stages.train_classifier import train_classifier
from stages.train_generator import train_generator
from vqpipe.artifacts import open_artifact
from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.streams import TokenDataset
from vqpipe.data.tokens import read_tokens
from vqpipe.data.transforms import center_crop, cover, crop_to_multiples, pixels
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.evaluation.generation import generated_size
from vqpipe.tokenizer import Tokenizer


@pytest.mark.parametrize("flip", [False, True])
def test_bytes_do_not_depend_on_batch_size_and_workers(
    tiny_tokenizer: Callable[..., Path],
    picture_folder: Path,
    tmp_path: Path,
    flip: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vqpipe.data.tokens.IMAGES_PER_SHARD", 4)
    (picture_folder / "drawn-5.png").write_bytes(b"no picture")
    tokenizer = tiny_tokenizer("tokenizer")
    for workers, batch_size in ((0, 1), (1, 3), (3, 4)):
        tokenize(
            [str(picture_folder)],
            tokenizer,
            tmp_path / f"{workers}",
            flip=flip,
            batch_size=batch_size,
            num_workers=workers,
            max_skipped=0.2,
            device="cpu",
        )
    made = [open_artifact(tmp_path / f"{workers}", "tokens") for workers in (0, 1, 3)]
    assert len({artifact.digest for artifact in made}) == 1
    assert made[0].facts["skipped"] == {"not-an-image": 1}
    assert made[0].facts["num_images"] == 9
    assert [name for name in made[0].names() if name.startswith("tokens")] == [
        f"tokens-0000{i}.parquet" for i in range(3)
    ]

    opened = Tokenizer.from_pretrained(tokenizer)
    parts = [read_tokens(made[0].file(name), opened.codebook_size) for name in made[0].names("tokens-*")]
    crop = center_crop(Image.open(picture_folder / "drawn-7.png").convert("RGB"), 32)[None]
    keys, ids = [key for part in parts for key in part.keys], torch.cat([part.ids for part in parts])
    place = next(i for i, key in enumerate(keys) if "drawn-7" in key)
    rows = [row for name in made[0].names("tokens-*") for row in pq.read_table(made[0].file(name)).to_pylist()]
    images = open_images(picture_folder)
    assert [row["key"] for row in rows] == [images.key(row["index"]) for row in rows]
    assert {row["shard"] for row in rows} == {picture_folder.name}
    assert torch.equal(ids[place], opened.encode(crop)[0])
    if flip:
        assert keys[place + 1] == keys[place]
        assert torch.equal(ids[place + 1], opened.encode(crop.flip(-1))[0])
        assert torch.cat([part.flipped for part in parts]).tolist() == [False, True] * 9


def test_rectangles_are_covered_cropped_and_decoded_to_their_size(
    tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path
) -> None:
    tokenizer, out = tiny_tokenizer("tokenizer"), tmp_path / "tokens"
    images: dict[str, Any] = {"images": [str(picture_folder)], "tokenizer": tokenizer, "device": "cpu"}
    tokenize(out=out, image_size="48x32", **images)
    made, opened = open_artifact(out, "tokens"), Tokenizer.from_pretrained(tokenizer)
    assert (made.facts["image_size"], made.facts["layout"]["grids"]) == ("48x32", [[16, 24]])
    tokens = read_tokens(made.file("tokens-00000.parquet"), 64)
    crop = cover(Image.open(picture_folder / "drawn-7.png").convert("RGB"), (32, 48))[None]
    place = next(i for i, key in enumerate(tokens.keys) if "drawn-7" in key)
    assert torch.equal(tokens.ids[place], opened.encode(crop)[0])

    detokenize(out, tokenizer, tmp_path / "images", device="cpu")
    stored = Image.open(io.BytesIO(open_images(tmp_path / "images")[place].image))
    assert stored.size == (48, 32)
    with pytest.raises(ConfigError, match=r"images of 48x32, and generators are for squares"):
        train_generator(tokens=out, tokenizer=tokenizer, out=tmp_path / "gpt", preset="gpt-tiny", device="cpu")
    for size, options, message in (
        ("48x32", {"crops": "ten"}, "48x32 is none"),
        ("48x", {}, "is not an image size"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(out=tmp_path / "other", image_size=size, **options, **images)
    with pytest.raises(DataError, match="not divisible"):
        tokenize(out=tmp_path / "other", image_size="49x32", **images)


def test_ten_crops_are_those_of_torchvision(
    tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path
) -> None:
    from torchvision.transforms import TenCrop

    tokenizer = tiny_tokenizer("tokenizer")
    tokenize([str(picture_folder)], tokenizer, tmp_path / "tokens", crops="ten", batch_size=4, device="cpu")
    made = open_artifact(tmp_path / "tokens", "tokens")
    assert made.facts["num_images"] == 10
    assert made.facts["image_size"] == 32
    assert made.config["crops"] == "ten"
    tokens = read_tokens(made.file("tokens-00000.parquet"), 64)
    assert tokens.flipped.tolist() == ([False] * 5 + [True] * 5) * 10
    opened = Tokenizer.from_pretrained(tokenizer)
    with Image.open(picture_folder / "drawn-7.png") as picture:
        whole = picture.convert("RGB")
    crops = [pixels(crop) for crop in TenCrop(32)(Image.fromarray(center_crop(whole, 35).permute(1, 2, 0).numpy()))]
    crops = [crops[place] for place in (4, 0, 1, 2, 3, 9, 5, 6, 7, 8)]  # ours have the center first
    place = next(i for i, key in enumerate(tokens.keys) if "drawn-7" in key)
    assert len(set(tokens.keys[place : place + 10])) == 1
    assert len({crop.numpy().tobytes() for crop in crops}) == 10
    assert torch.equal(tokens.ids[place : place + 10], torch.cat([opened.encode(crop[None]) for crop in crops]))

    detokenize(made.path, tokenizer, tmp_path / "images", device="cpu")
    decoded = {sample.key: sample.image for sample in open_images([tmp_path / "images"])}
    assert len(decoded) == 100
    stem = tokens.keys[place].replace(".", "_").removesuffix("_png")
    for view, name in ((0, ""), (4, "-bottom-right"), (5, "-flipped"), (6, "-top-left-flipped")):
        expected = opened.decode(tokens.ids[place + view][None], (32, 32))[0]
        difference = pixels(decode(decoded[stem + name])).int() - expected.int()
        assert difference.abs().max() <= 1  # one level, where the processor computes a batch in another order

    with pytest.raises(ConfigError, match="--crops ten includes the flip of each image"):
        tokenize([str(picture_folder)], tokenizer, tmp_path / "both", crops="ten", flip=True, device="cpu")
    assert not list(tmp_path.glob("both*"))


def test_bf16_is_used_only_on_request(
    tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer("tokenizer")
    tokenize([str(picture_folder)], tokenizer, tmp_path / "plain", device="cpu")
    tokenize([str(picture_folder)], tokenizer, tmp_path / "bf16", precision="bf16", device="cpu")
    plain, bf16 = (open_artifact(tmp_path / name) for name in ("plain", "bf16"))
    assert (plain.config["precision"], bf16.config["precision"]) == ("fp32", "bf16")
    ids = [read_tokens(made.file("tokens-00000.parquet"), 64).ids.numpy() for made in (plain, bf16)]
    assert 0.5 < np.mean(ids[0] == ids[1]) <= 1
    assert "10 images in 0:0" in capsys.readouterr().err


@pytest.fixture
def sized_folder(tmp_path: Path) -> Path:
    """Smooth pictures of several sizes; one is turned by its EXIF orientation, one too small, one no picture."""
    folder = tmp_path / "sized"
    folder.mkdir()
    for number, (width, height) in enumerate([(48, 32), (49, 33), (32, 32), (31, 47), (3, 2), (1, 9), (48, 32)]):
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(rows / (3 + number) + shift) + np.cos(columns / (2 + number)) for shift in range(3)]
        picture = Image.fromarray((np.stack(waves, -1) * 63 + 127).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 6 else 1
        picture.save(folder / f"{number}.jpg", quality=95, exif=exif)
    (folder / "7.jpg").write_bytes(b"no picture")
    return folder


def test_native_sizes_have_shards_of_their_own_and_are_decoded_to_their_size(
    tiny_tokenizer: Callable[..., Path],
    sized_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tiny_tokenizer("tokenizer")
    for workers, batch_size in ((0, 32), (2, 1)):
        tokenize(
            [str(sized_folder)],
            tokenizer,
            tmp_path / f"{workers}",
            image_size="native",
            flip=True,
            batch_size=batch_size,
            num_workers=workers,
            max_skipped=0.2,
            device="cpu",
        )
    made = open_artifact(tmp_path / "0", "tokens")
    assert made.digest == open_artifact(tmp_path / "2").digest
    assert "5 sizes, the largest 32x48 (1 image), the most frequent 48x32 (2 images)" in capsys.readouterr().err
    counts = {"48x32": 2, "32x48": 1, "30x46": 1, "32x32": 1, "2x2": 1}
    assert {size: table["num_images"] for size, table in made.facts["sizes"].items()} == counts
    assert (made.facts["num_images"], made.facts["num_sizes"], made.facts["image_size"]) == (6, 5, "native")
    assert (made.facts["skipped"], made.facts["excluded"]) == ({"not-an-image": 1}, {"too-small": 1})
    assert made.facts["sizes"]["48x32"]["layout"]["grids"] == [[16, 24]]
    assert made.names("tokens-*.parquet") == sorted(f"tokens-{size}-00000.parquet" for size in counts)

    opened = Tokenizer.from_pretrained(tokenizer)
    for name in made.names("tokens-*.parquet"):
        tokens = read_tokens(made.file(name), 64)
        for key, ids, flipped in zip(tokens.keys, tokens.ids, tokens.flipped, strict=True):
            crop = crop_to_multiples(decode((sized_folder / f"{key}.jpg").read_bytes()), 2)
            assert f"{crop.shape[2]}x{crop.shape[1]}" in name
            assert torch.equal(ids, opened.encode(crop.flip(-1)[None] if flipped else crop[None])[0])

    tokenize([str(sized_folder)], tokenizer, tmp_path / "square", image_size="32", max_skipped=0.3, device="cpu")
    square = read_tokens(open_artifact(tmp_path / "square").file("tokens-00000.parquet"), 64)
    native = read_tokens(made.file("tokens-32x32-00000.parquet"), 64)
    with pytest.raises(DataError, match="has images of 32, not of 48x32"):
        TokenDataset(tmp_path / "square", image_size="48x32")
    assert torch.equal(square.ids[square.keys.index("2")], native.ids[0])

    detokenize(made.path, tokenizer, tmp_path / "images", device="cpu")
    decoded = {sample.key: Image.open(io.BytesIO(sample.image)) for sample in open_images([tmp_path / "images"])}
    sizes = {"0": (48, 32), "1": (48, 32), "2": (32, 32), "3": (30, 46), "4": (2, 2), "6": (32, 48)}
    assert {key: image.size for key, image in decoded.items()} == sizes | {
        f"{key}-flipped": size for key, size in sizes.items()
    }


def test_tokens_of_native_sizes_are_read_one_size_at_a_time_and_not_trained_on(
    tiny_tokenizer: Callable[..., Path], sized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = tiny_tokenizer("tokenizer"), tmp_path / "tokens"
    images: dict[str, Any] = {"images": [str(sized_folder)], "tokenizer": tokenizer, "max_skipped": 0.5}
    tokenize(out=out, image_size="native", device="cpu", **images)
    with pytest.raises(DataError, match=r"tokens has images of their own sizes: 48x32 \(2\), .*Give image_size"):
        TokenDataset(out)
    with pytest.raises(DataError, match="images of other sizes than 64: 48x32"):
        TokenDataset(out, image_size=64)
    tokens = TokenDataset(out, image_size="48x32")
    square = TokenDataset(out, image_size=32)[0]
    assert [tokens[i]["key"] for i in range(len(tokens))] == ["0", "1"]
    assert len(TokenDataset(out, image_size=32)) == len(TokenDataset(out, image_size=(32, 32))) == 1
    assert len(TokenDataset(out, image_size=(32, 48))) == len(tokens)
    monkeypatch.setattr("vqpipe.data.examples.IN_MEMORY", 0)
    for size, item in (("48x32", tokens[0]), ("32x32", square)):
        mapped = TokenDataset(out, image_size=size, cache=tmp_path / "cache")
        assert torch.equal(mapped[0]["ids"], item["ids"])
    assert (tokens.facts["image_size"], tokens.facts["num_tokens"]) == ("48x32", len(tokens[0]["ids"]))
    batch = next(iter(tokens.stream(seed=0, batch_size=2)))
    assert batch["ids"].shape == (2, 384)
    for train, preset in ((train_generator, "gpt-tiny"), (train_classifier, "linear-probe")):
        with pytest.raises(ConfigError, match=r"own sizes: 48x32 .*one size is trained on. Tokenize with one number"):
            train(tokens=out, tokenizer=tokenizer, out=tmp_path / "trained", preset=preset, device="cpu")

    tokenize(out=tmp_path / "few", image_size="native", max_pixels=1200, device="cpu", **{**images, "max_skipped": 0.2})
    few = open_artifact(tmp_path / "few")
    assert (list(few.facts["sizes"]), few.config["max_pixels"]) == (["32x32", "2x2"], 1200)
    assert (few.facts["skipped"], few.facts["excluded"]) == ({"not-an-image": 1}, {"too-large": 4, "too-small": 1})
    reasons = pq.read_table(few.file("skipped.parquet"))["reason"].to_pylist()
    assert sorted(reasons) == ["not-an-image", *["too-large"] * 4, "too-small"]
    with pytest.raises(
        DataError, match=r"none of the 8 images .* \(1 not-an-image, 7 too-large\)\. .*raise --max-pixels"
    ):
        tokenize(out=tmp_path / "none", image_size="native", max_pixels=1, device="cpu", **images)


def test_a_tokenizer_that_cannot_encode_a_size_is_refused_before_the_work(
    tiny_tokenizer: Callable[..., Path], sized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def squares(self: Tokenizer, height: int, width: int) -> None:
        if height != width:
            raise ConfigError("ids in one dimension are of squares")

    monkeypatch.setattr(Tokenizer, "layout", squares)
    images: dict[str, Any] = {"images": [str(sized_folder)], "tokenizer": tiny_tokenizer("t"), "device": "cpu"}
    with pytest.raises(DataError, match="cannot encode images of 32x48 at their own size: ids in one dimension"):
        tokenize(out=tmp_path / "out", image_size="native", **images)
    assert not list((tmp_path / "out.partial").glob("tokens-*"))
    for options, message in (
        ({"image_size": "native", "crops": "ten"}, "native is none"),
        ({"image_size": "32", "max_pixels": 9}, "--max-pixels is for images at their own sizes"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(out=tmp_path / "other", **options, **images)


def test_limit_stores_the_tokens_of_the_first_images(
    tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path
) -> None:
    tokenizer, options = tiny_tokenizer("tokenizer"), {"num_workers": 0, "device": "cpu"}
    for name, limit in (("all", None), ("three", 3), ("many", 1000)):
        tokenize([str(picture_folder)], tokenizer, tmp_path / name, limit=limit, **options)
    whole, three, many = (open_artifact(tmp_path / name, "tokens") for name in ("all", "three", "many"))
    assert (whole.facts["num_images"], three.facts["num_images"]) == (10, 3)
    assert (many.manifest.request, many.digest) == (whole.manifest.request, whole.digest)
    rows = [pq.read_table(each.file("tokens-00000.parquet")).to_pylist() for each in (whole, three)]
    assert rows[1] == rows[0][:3]
    with pytest.raises(ArtifactError, match="--limit is another"):
        tokenize([str(picture_folder)], tokenizer, tmp_path / "three", limit=4, **options)


def test_detokenize_writes_png_files_named_by_row_and_key(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqpipe.data.tokens.IMAGES_PER_SHARD", 2)
    pictures = tmp_path / "pictures"
    names = ["cat/a b", "cat/a_b", "dog/\u00e9\n..", "dog/" + "\u65e5" * 80]
    for number, name in enumerate(names):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(pictures / f"{name}.png")
    tokenizer, options = tiny_tokenizer("tokenizer"), {"device": "cpu"}
    tokenize([str(pictures)], tokenizer, tmp_path / "tokens", num_workers=0, **options)
    for form in ("tar", "png"):
        detokenize(tmp_path / "tokens", tokenizer, tmp_path / form, form=form, batch_size=1, **options)
    tars, files = open_images(tmp_path / "tar"), open_images(tmp_path / "png")
    assert [(each.image, each.label) for each in files] == [(each.image, each.label) for each in tars]
    made = sorted(file.name for file in (tmp_path / "png" / "images").glob("*.png"))
    assert made[:3] == ["00000000-cat_a_b.png", "00000001-cat_a_b.png", "00000002-dog_\u00e9___.png"]
    assert len(made) == 4
    detokenize(tmp_path / "tokens", tokenizer, tmp_path / "three", form="png", limit=3, **options)
    assert len(open_images(tmp_path / "three")) == 3
    assert generated_size([str(tmp_path / form) for form in ("tar", "png")]) == 32
