"""Tiny copies of every data set, laid out as its manifest says, with files beside them that are not theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqpipe.data.manifests import NameList, Split, as_expression, every, load_manifest, manifest_names, open_split
from vqpipe.errors import ConfigError, DataError

COPIES: dict[tuple[str, str], tuple[list[str], list[str]]] = {
    ("argoverse2", "all"): (["val/log1/sensors/cameras/ring_front/1.jpg"], ["val/log1/map/1.jpg"]),
    ("celeba", "test"): (["img_align_celeba/000002.jpg"], ["img_align_celeba/000001.jpg"]),
    ("celeba", "train"): (["img_align_celeba/000001.jpg"], ["img_align_celeba/000002.jpg"]),
    ("celeba-hq", "all"): (["CelebAMask-HQ/CelebA-HQ-img/0.jpg"], ["CelebAMask-HQ/mask/0/00000_skin.png"]),
    ("davis-2017", "val"): (
        ["DAVIS/JPEGImages/Full-Resolution/cow/00000.jpg", "DAVIS/JPEGImages/Full-Resolution/cow/00001.jpg"],
        ["DAVIS/JPEGImages/Full-Resolution/bear/00000.jpg", "DAVIS/Annotations/Full-Resolution/cow/00000.png"],
    ),
    ("enerf-outdoor", "sampled"): (
        [f"enerf_outdoor/actor1/images/00/{i:06}.jpg" for i in (0, 100)],
        [f"enerf_outdoor/actor1/images/00/{i:06}.jpg" for i in range(1, 100)] + ["enerf_outdoor/actor1/masks/1.png"],
    ),
    ("hrsod", "test"): (["HRSOD_release/HRSOD_test/a.jpg"], ["HRSOD_release/HRSOD_test_mask/a.png"]),
    ("kodak", "all"): ([f"kodim{i:02}.png" for i in range(1, 25)], ["thumbs/kodim01.png", "contact.png"]),
    ("laion-hq", "all"): (["00000/1.jpg", "00000/2.webp"], ["00000/1.json"]),
    ("liu4k", "test"): (["LIU4k/deep/er/a.png"], ["other/a.png"]),
    ("mapillary-vistas", "all"): (["training/images/a.jpg"], ["training/v1.2/labels/a.png"]),
    ("open-images", "all"): (["train/0/a.jpg"], ["a.csv"]),
    ("sa-1b", "all"): (["sa_000/sa_1.jpg"], ["sa_000/sa_1.json"]),
    ("spring", "test"): (["spring/test/0003/frame_left/frame_left_0001.png"], ["spring/test/0003/disp1_left/d.png"]),
    ("textocr", "val"): (["train_images/a1.jpg"], ["train_images/b2.jpg"]),
    ("textocr", "test"): (["test_images/c3.jpg"], ["train_images/b2.jpg"]),
    ("uavid", "test"): (["uavid_test/seq21/Images/000000.png"], ["uavid_val/seq16/Images/000000.png"]),
    ("uhdbench", "all"): (["UHDBench/LIU4k/a.png", "UHDBench/UHDM/test/0_gt.jpg"], ["UHDBench/LIU4k/small.png"]),
    ("uhdm", "test"): (["uhdm_data/test/0000_gt.jpg"], ["uhdm_data/test/0000_moire.jpg"]),
    ("uhrsd", "test"): (["UHRSD_TE/image/a.jpg"], ["UHRSD_TE/mask/a.png"]),
    ("vfhq", "sampled"): (
        [f"VFHQ-Test/GT/Interval1_512x512_LANCZOS4/{clip}/{i:08}.png" for clip in "ab" for i in (0, 10)],
        [f"VFHQ-Test/GT/Interval1_512x512_LANCZOS4/{clip}/{i:08}.png" for clip in "ab" for i in range(1, 10)],
    ),
    ("folder", "all"): (["a/1.png"], ["a/1.txt"]),
    ("ffhq", "val"): (["images1024x1024/60000/60000.png"], ["images1024x1024/00000/00001.png"]),
    ("imagenet-1k", "train"): (["train/n01440764/x.JPEG"], ["val/n01440764/y.JPEG"]),
    ("imagenette", "train"): (["imagenette2/train/n01440764/x.JPEG"], ["imagenette2/val/n01440764/y.JPEG"]),
}
LISTS = {
    "celeba": {"list_eval_partition.txt": "000001.jpg 0\n000002.jpg 2\n"},
    "davis-2017": {"DAVIS/ImageSets/2017/val.txt": "cow\n"},
    "textocr": {"TextOCR_0.1_val.json": json.dumps({"info": {}, "imgs": {"a1": {"id": "a1"}}})},
    "uhdbench": {"UHDBench/UHDBench.json": json.dumps({"LIU4k": ["LIU4k/a.png"], "UHDM": ["./UHDM/test/0_gt.jpg"]})},
}


def copy_of(folder: Path, files: list[str], lists: dict[str, str]) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())
    for name, text in lists.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("name", "split"), COPIES)
def test_a_split_is_its_own_files_and_no_others(name: str, split: str, tmp_path: Path) -> None:
    theirs, others = COPIES[name, split]
    copy = copy_of(tmp_path, [*theirs, *others], LISTS.get(name, {}))
    manifest = load_manifest(name)
    found = open_split(manifest, manifest.splits[split], copy)
    assert sorted(found[i].image.decode() for i in range(len(found))) == sorted(theirs)


def test_every_manifest_has_a_copy_here() -> None:
    assert {name for name, _ in COPIES} | {"webdataset"} == set(manifest_names())


def test_tars_bring_their_own_classes(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.tar").write_bytes(pack({"b.png": b"B"}))
    (tmp_path / "0.tar").write_bytes(pack({"a.jpg": b"A", "a.cls": b"7"}))
    manifest = load_manifest("webdataset")
    found = open_split(manifest, manifest.splits["all"], tmp_path)
    assert [(image.key, image.image, image.label) for image in found] == [("a", b"A", 7), ("b", b"B", None)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no \*\*/\*\.tar"):
        open_split(manifest, manifest.splits["all"], tmp_path / "empty")


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.png", ["a.png", "a.b.png"], ["b/a.png", "a.pngx", "xpng"]),
        ("**/*.png", ["a.png", "b/c/a.png"], ["a.jpg"]),
        ("x/?.jpg", ["x/1.jpg"], ["x/12.jpg", "x//.jpg"]),
        ("x/{name}/*.jpg", ["x/a/1.jpg", "x/a/b/1.jpg"], ["y/a/1.jpg"]),
        ("a+(b)[c].png", ["a+(b)[c].png"], ["aab.png"]),
    ],
)
def test_patterns(pattern: str, matches: list[str], others: list[str]) -> None:
    import re

    rule = re.compile(as_expression(pattern))
    assert [file for file in [*matches, *others] if rule.fullmatch(file)] == matches


def test_a_stride_counts_in_each_folder() -> None:
    files = ["a/0", "a/1", "a/2", "b/0", "b/1", "top"]
    assert every(2, files) == ["a/0", "a/2", "b/0", "top"]
    assert every(1, files) == files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "is not a list of names: TypeError"),
        ('{"a": {"b": 1}}', "is not a list of names"),
        ("{", "is not a list of names: JSONDecodeError"),
        ("[]", "names nothing for this split"),
        ('["LIU4k/a.png", "gone.png"]', r"names 1 of 2 that are not in .*, as 'gone\.png'\. Complete"),
        ('["../secret.png"]', r"names 1 of 1 that are not in"),
        ('["/etc/hostname.png"]', r"names 1 of 1 that are not in"),
    ],
)
def test_lists_that_cannot_be_followed(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"not of this set")
    copy = copy_of(tmp_path / "copy", ["UHDBench/LIU4k/a.png"], {"UHDBench/UHDBench.json": text})
    manifest = load_manifest("uhdbench")
    with pytest.raises(DataError, match=said):
        open_split(manifest, manifest.splits["all"], copy)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    copy = copy_of(tmp_path, ["UHDBench/LIU4k/a.png"], {})
    manifest = load_manifest("uhdbench")
    with pytest.raises(DataError, match=r"has no UHDBench\.json, which says what this split holds"):
        open_split(manifest, manifest.splits["all"], copy)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"files": ("../*.png",)}, "leaves the data set's folder"),
        ({"tars": ("/data/*.tar",)}, "leaves the data set's folder"),
        ({"folders": ("a\\b",)}, "leaves the data set's folder"),
        ({"files": ("*.png",), "tars": ("*.tar",)}, "given by tars and by files"),
        ({"files": ("{name}.png",)}, "each needs the other"),
        ({"files": ("*.png",), "names": NameList(file="a.txt")}, "each needs the other"),
        ({"stride": 0}, "stride and min_size start at 1"),
        ({"min_size": (0, 5)}, "stride and min_size start at 1"),
    ],
)
def test_splits_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Split(**settings)
