import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from vqpipe.data.folders import Folder
from vqpipe.data.images import ImageSet
from vqpipe.data.manifests import (
    Archive,
    DatasetManifest,
    NameList,
    Split,
    as_expression,
    check_archives,
    check_counts,
    every,
    load_manifest,
    manifest_names,
    open_split,
    read_names,
)
from vqpipe.data.transforms import Framing
from vqpipe.errors import ConfigError, DataError

FACTS = {
    ("imagenet-1k", "train"): (1_281_167, 1000),
    ("imagenet-1k", "val"): (50_000, 1000),
    ("ffhq", "train"): (60_000, None),
    ("ffhq", "val"): (10_000, None),
    ("ffhq", "all"): (70_000, None),
    ("imagenette", "train"): (9_469, 10),
    ("imagenette", "val"): (3_925, 10),
    ("celeba", "all"): (202_599, None),
    ("celeba-hq", "all"): (30_000, None),
    ("kodak", "all"): (24, None),
    ("textocr", "train"): (21_778, None),
    ("textocr", "val"): (3_124, None),
    ("textocr", "test"): (3_232, None),
    ("uhdbench", "all"): (2_293, None),
}


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", manifest_names())
def test_every_manifest_loads_and_is_consistent(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name
    assert manifest.title
    assert manifest.licence
    assert manifest.how_to_obtain.strip()
    assert manifest.paper_split.strip()
    assert manifest.homepage.startswith("https://") or name in ("folder", "webdataset")
    assert manifest.split(None)[0] == next(iter(manifest.splits))
    for measured in manifest.measured:
        assert measured.table.startswith(("VQGAN-LC, ", "MGVQ, "))
        assert measured.framing.size is not None
    for split in manifest.splits.values():
        # a split that a paper evaluates on has a count, or is listed as unverified
        measures = any(manifest.splits[measured.split] is split for measured in manifest.measured)
        assert split.num_images is not None or not measures or manifest.unverified or manifest.unstated
        if manifest.measured and manifest.measured[0].table.startswith("MGVQ, Table 3") and name != "davis-2017":
            assert split.min_size == (2560, 1440)
    assert all(len(archive.md5) in (0, 32) for archive in manifest.archives)


def test_the_data_sets_of_both_papers_have_manifests() -> None:
    vqgan_lc = {"imagenet-1k", "ffhq"}
    uhdbench = {"uhdbench", "hrsod", "liu4k", "uavid", "uhdm", "uhrsd"}
    zero_shot = {"celeba", "celeba-hq", "davis-2017", "textocr", "vfhq", "spring", "enerf-outdoor"}
    training = {"open-images", "sa-1b", "argoverse2", "mapillary-vistas", "laion-hq"}
    assert vqgan_lc | uhdbench | zero_shot | training | {"kodak", "imagenette"} <= set(manifest_names())
    tables: dict[str, set[str]] = {}
    for name in manifest_names():
        for measured in load_manifest(name).measured:
            tables.setdefault(measured.table, set()).add(name)
    assert tables["MGVQ, Table 2"] == zero_shot - {"celeba-hq"}
    assert tables["MGVQ, Table 3"] == {"uhdbench", "davis-2017"}
    assert {load_manifest("uhdbench").measured[0].framing} == {Framing(rule="cover", size=(1440, 2560))}


def test_counts_of_the_counted_data_sets() -> None:
    found = {
        (name, key): (split.num_images, split.num_classes)
        for name in manifest_names()
        for key, split in load_manifest(name).splits.items()
        if split.num_images is not None
    }
    assert found == FACTS


NAMES = {
    ("kodak", "all"): [f"kodim{i:02}" for i in range(1, 25)],
    ("ffhq", "val"): [f"{i:05}" for i in range(60_000, 70_000)],
    ("imagenet-1k", "val"): [f"ILSVRC2012_val_{i:08}" for i in range(1, 50_001)],
    ("celeba", "all"): [f"{i:06}" for i in range(1, 202_600)],
    ("celeba-hq", "all"): [str(i) for i in range(30_000)],
}


@pytest.mark.parametrize(("name", "key"), NAMES)
def test_digests_match_the_published_names(name: str, key: str) -> None:
    lines = "".join(f"{stem}\n" for stem in sorted(NAMES[name, key]))
    assert load_manifest(name).splits[key].stems_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_names_are_checked_by_their_digest(tmp_path: Path) -> None:
    manifest, files = load_manifest("kodak"), [f"deep/kodim{i:02}.png" for i in range(24, 0, -1)]
    check_counts(manifest, "all", ImageSet([Folder(tmp_path, files)]))
    with pytest.raises(DataError, match="kodak/all holds the right number of images, but other names"):
        check_counts(manifest, "all", ImageSet([Folder(tmp_path, ["kodak.png", *files[1:]])]))


def test_archives_are_checked_by_md5(tmp_path: Path) -> None:
    whole, other = Archive(file="a.zip", md5=hashlib.md5(b"a").hexdigest()), Archive(file="b.zip", md5="0" * 32)
    manifest = replace(load_manifest("kodak"), archives=(whole, other, Archive(file="c.zip")))
    assert check_archives(manifest, tmp_path) == []
    (tmp_path / "a.zip").write_bytes(b"a")
    (tmp_path / "c.zip").write_bytes(b"c")
    assert check_archives(manifest, tmp_path) == ["a.zip"]
    (tmp_path / "b.zip").write_bytes(b"b")
    with pytest.raises(DataError, match=r"b\.zip has the MD5 [0-9a-f]{32}, 0{32} is expected"):
        check_archives(manifest, tmp_path)


def test_errors_in_manifests_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown data set 'imagenet'. Did you mean imagenet"):
        load_manifest("imagenet")
    with pytest.raises(ConfigError, match=r"ffhq has no split 'vall'. Did you mean val"):
        load_manifest("ffhq").split("vall")
    (tmp_path / "own.toml").write_text("name = 'own'\n")
    with pytest.raises(ConfigError, match="no splits"):
        load_manifest(str(tmp_path / "own.toml"))
    (tmp_path / "own.toml").write_text(
        "name='own'\ntitle='t'\nlicence='l'\nhomepage='h'\nhow_to_obtain='o'\npaper_split='p'\n"
        "[[measured]]\ntable='T'\nsplit='val'\nrule='adm'\nsize='256'\n[splits.all]\n"
    )
    with pytest.raises(ConfigError, match="T is measured on the unknown split 'val'"):
        load_manifest(str(tmp_path / "own.toml"))
    (tmp_path / "own.toml").write_text((tmp_path / "own.toml").read_text().replace("256", "256x512"))
    with pytest.raises(ConfigError, match="ADM's crop is square"):
        load_manifest(str(tmp_path / "own.toml"))
    with pytest.raises(DataError, match=r"is not a folder. To get ffhq: Run the download script"):
        open_split(load_manifest("ffhq"), Split(), tmp_path / "absent")


def test_ffhq_splits_are_selected_by_number(tmp_path: Path) -> None:
    files = ("60000/60000.png", "00000/00007.png", "59000/59999.png", "69000/69999.png", "LICENSE/thumb.png")
    write(tmp_path / "images1024x1024", *files)
    manifest = load_manifest("ffhq")
    found = {
        name: [image.key.rpartition("/")[2] for image in open_split(manifest, split, tmp_path)]
        for name, split in manifest.splits.items()
    }
    assert found == {
        "train": ["00007", "59999"],
        "val": ["60000", "69999"],
        "all": ["00007", "59999", "60000", "69999"],
    }
    with pytest.raises(DataError, match=r"ffhq/train should hold 60,000 images, found 2. .*--allow-partial"):
        check_counts(manifest, "train", open_split(manifest, manifest.splits["train"], tmp_path))


@pytest.fixture
def imagenet() -> tuple[DatasetManifest, Split]:
    return load_manifest("imagenet-1k"), Split(
        num_images=3, num_classes=2, folders=("val",), class_lists=("val_synsets.txt",), devkit="devkit"
    )


def labelled(manifest: DatasetManifest, split: Split, source: Path) -> list[tuple[str, int | None]]:
    images = open_split(manifest, split, source)
    check_counts(replace(manifest, splits={"val": split}), "val", images)
    return [(image.key, image.label) for image in images]


def test_imagenet_val_in_class_folders_or_flat(imagenet: tuple[DatasetManifest, Split], tmp_path: Path) -> None:
    sorted_copy = write(tmp_path / "1", "val/n02/v_2.JPEG", "val/n01/v_3.JPEG", "val/n02/v_1.JPEG")
    assert labelled(*imagenet, sorted_copy) == [("n01/v_3", 0), ("n02/v_1", 1), ("n02/v_2", 1)]
    with pytest.raises(DataError, match="imagenet-1k/val should hold 3 classes, found 2"):
        labelled(imagenet[0], replace(imagenet[1], num_classes=3), sorted_copy)

    expected = [("v_1", 1), ("v_2", 1), ("v_3", 0)]
    flat = write(tmp_path / "2", "val/v_2.JPEG", "val/v_3.JPEG", "val/v_1.JPEG")
    with pytest.raises(DataError, match=r"is flat, and .* put there val_synsets.txt or devkit/"):
        labelled(*imagenet, flat)

    write(flat, "devkit/data/meta.mat")
    synsets = np.array(
        [(1, "n02", 0), (2, "n01", 0), (3, "n00", 2)],
        dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")],
    )
    savemat(flat / "devkit/data/meta.mat", {"synsets": synsets})
    (flat / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n1\n2\n")
    assert labelled(*imagenet, flat) == expected

    (flat / "val_synsets.txt").write_text("n02\nn02\nn01\n")
    assert labelled(*imagenet, flat) == expected
    (flat / "val_synsets.txt").write_text("n02\nn02\n")
    with pytest.raises(DataError, match=r"lists 2 images, .* holds 3"):
        labelled(*imagenet, flat)
    (flat / "val_synsets.txt").write_text("10\n10\n9\n")  # numbered by value, as class folders
    assert labelled(*imagenet, flat) == expected
    (flat / "val_synsets.txt").write_text("sea lion\nsea lion\n\n otter\n")
    assert labelled(*imagenet, flat) == expected
    (flat / "val_synsets.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"val_synsets.txt is not a list of names: UnicodeDecodeError"):
        labelled(*imagenet, flat)


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
def test_a_split_contains_exactly_its_files(name: str, split: str, tmp_path: Path) -> None:
    theirs, others = COPIES[name, split]
    copy = copy_of(tmp_path, [*theirs, *others], LISTS.get(name, {}))
    manifest = load_manifest(name)
    found = open_split(manifest, manifest.splits[split], copy)
    assert sorted(found[i].image.decode() for i in range(len(found))) == sorted(theirs)


@pytest.mark.parametrize(
    ("text", "second", "expected"),
    [("a b\n\n b\n", "", ["a b", "b"]), ("a b 1\nc b\nd\ne f\ng h b\n", "b", ["a", "c"])],
)
def test_text_lists_have_a_name_per_line(text: str, second: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    assert read_names(NameList(file="list.txt", second=second), tmp_path, tmp_path) == expected


def test_every_manifest_has_an_example_copy() -> None:
    assert {name for name, _ in COPIES} | {"webdataset"} == set(manifest_names())


def test_tars_have_their_own_classes(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.tar").write_bytes(pack({"b.png": b"B"}))
    (tmp_path / "0.tar").write_bytes(pack({"a.jpg": b"A", "a.cls": b"7"}))
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
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
        ("{name}/{name}-?.png", ["a/a-1.png", "a/b/a/b-1.png"], ["a/b-1.png", "a/a.png"]),
        ("a+(b)[c].png", ["a+(b)[c].png"], ["aab.png"]),
    ],
)
def test_file_patterns(pattern: str, matches: list[str], others: list[str]) -> None:
    import re

    rule = re.compile(as_expression(pattern))
    assert [file for file in [*matches, *others] if rule.fullmatch(file)] == matches


def test_a_stride_counts_per_folder() -> None:
    files = ["a/0", "a/1", "a/2", "b/0", "b/1", "top"]
    assert every(2, files) == ["a/0", "a/2", "b/0", "top"]
    assert every(1, files) == files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a list of names: TypeError"),
        ('{"a": {"b": 1}}', "is not a list of names"),
        ("{", "is not a list of names: JSONDecodeError"),
        ("[]", "lists nothing for this split"),
        ('["LIU4k/a.png", "gone.png"]', r"lacks 1 of the 2 files in .*, as 'gone\.png'\. Complete"),
        ('["../secret.png"]', r"lacks 1 of the 1 files in"),
        ('["/etc/hostname.png"]', r"lacks 1 of the 1 files in"),
    ],
)
def test_damaged_lists_and_missing_files_are_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"not of this set")
    copy = copy_of(tmp_path / "copy", ["UHDBench/LIU4k/a.png"], {"UHDBench/UHDBench.json": text})
    manifest = load_manifest("uhdbench")
    with pytest.raises(DataError, match=message):
        open_split(manifest, manifest.splits["all"], copy)


def test_a_missing_list_is_an_error(tmp_path: Path) -> None:
    copy = copy_of(tmp_path, ["UHDBench/LIU4k/a.png"], {})
    manifest = load_manifest("uhdbench")
    with pytest.raises(DataError, match=r"has no UHDBench\.json, the list of this split"):
        open_split(manifest, manifest.splits["all"], copy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ("../*.png",)}, "is outside the data set's folder"),
        ({"tars": ("/data/*.tar",)}, "is outside the data set's folder"),
        ({"folders": ("a\\b",)}, "is outside the data set's folder"),
        ({"files": ("*.png",), "tars": ("*.tar",)}, "a split has tars and files"),
        ({"files": ("{name}.png",)}, "needs both names and"),
        ({"files": ("*.png",), "names": NameList(file="a.txt")}, "needs both names and"),
        ({"stride": 0}, "stride and min_size are at least 1"),
        ({"min_size": (0, 5)}, "stride and min_size are at least 1"),
    ],
)
def test_invalid_splits_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Split(**settings)
