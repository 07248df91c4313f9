import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from vqpipe.data.images import Folder, ImageSet
from vqpipe.data.manifests import (
    Archive,
    DatasetManifest,
    Split,
    check_archives,
    check_counts,
    load_manifest,
    manifest_names,
    one_line,
    open_split,
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
def test_every_manifest_is_whole(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name
    assert manifest.title
    assert manifest.licence
    assert one_line(manifest.how_to_obtain)
    assert one_line(manifest.paper_split)
    assert manifest.homepage.startswith("https://") or name in ("folder", "webdataset")
    assert manifest.split(None)[0] == next(iter(manifest.splits))
    for measured in manifest.measured:
        assert measured.table.startswith(("VQGAN-LC, ", "MGVQ, "))
        assert measured.framing.size is not None
    for split in manifest.splits.values():
        # what nobody counted here must be said to be unknown, where a paper measures with it
        measures = any(manifest.splits[measured.split] is split for measured in manifest.measured)
        assert split.num_images is not None or not measures or manifest.unverified or manifest.unstated
        if manifest.measured and manifest.measured[0].table.startswith("MGVQ, Table 3") and name != "davis-2017":
            assert split.min_size == (2560, 1440)
    assert all(len(archive.md5) in (0, 32) for archive in manifest.archives)


def test_the_sets_of_both_papers_are_there() -> None:
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


def test_facts_of_those_that_were_counted() -> None:
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
def test_digests_are_those_of_the_published_names(name: str, key: str) -> None:
    lines = "".join(f"{stem}\n" for stem in sorted(NAMES[name, key]))
    assert load_manifest(name).splits[key].stems_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_names_are_checked_by_their_digest(tmp_path: Path) -> None:
    manifest, files = load_manifest("kodak"), [f"deep/kodim{i:02}.png" for i in range(24, 0, -1)]
    check_counts(manifest, "all", ImageSet([Folder(tmp_path, files)]))
    with pytest.raises(DataError, match="kodak/all has as many images as it should, but other names"):
        check_counts(manifest, "all", ImageSet([Folder(tmp_path, ["kodak.png", *files[1:]])]))


def test_archives_are_hashed_where_they_lie(tmp_path: Path) -> None:
    whole, other = Archive(file="a.zip", md5=hashlib.md5(b"a").hexdigest()), Archive(file="b.zip", md5="0" * 32)
    manifest = replace(load_manifest("kodak"), archives=(whole, other, Archive(file="c.zip")))
    assert check_archives(manifest, tmp_path) == []
    (tmp_path / "a.zip").write_bytes(b"a")
    (tmp_path / "c.zip").write_bytes(b"c")
    assert check_archives(manifest, tmp_path) == ["a.zip"]
    (tmp_path / "b.zip").write_bytes(b"b")
    with pytest.raises(DataError, match=r"b\.zip has the MD5 [0-9a-f]{32}, 0{32} is expected"):
        check_archives(manifest, tmp_path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data set is named 'imagenet'. Did you mean imagenet"):
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
    with pytest.raises(ConfigError, match="T measures a split 'val' that is not there"):
        load_manifest(str(tmp_path / "own.toml"))
    (tmp_path / "own.toml").write_text((tmp_path / "own.toml").read_text().replace("256", "256x512"))
    with pytest.raises(ConfigError, match="ADM's crop is square"):
        load_manifest(str(tmp_path / "own.toml"))
    with pytest.raises(DataError, match=r"is no folder. To get ffhq: Run the download script"):
        open_split(load_manifest("ffhq"), Split(), tmp_path / "absent")


def test_ffhq_splits_go_by_number(tmp_path: Path) -> None:
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


def test_imagenet_val_sorted_or_flat(imagenet: tuple[DatasetManifest, Split], tmp_path: Path) -> None:
    sorted_copy = write(tmp_path / "1", "val/n02/v_2.JPEG", "val/n01/v_3.JPEG", "val/n02/v_1.JPEG")
    assert labelled(*imagenet, sorted_copy) == [("n01/v_3", 0), ("n02/v_1", 1), ("n02/v_2", 1)]

    expected = [("v_1", 1), ("v_2", 1), ("v_3", 0)]
    flat = write(tmp_path / "2", "val/v_2.JPEG", "val/v_3.JPEG", "val/v_1.JPEG")
    with pytest.raises(DataError, match=r"is flat, and nothing .* put there val_synsets.txt or devkit/"):
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
