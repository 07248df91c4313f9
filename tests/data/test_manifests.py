from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from vqpipe.data.manifests import DatasetManifest, Split, check_counts, load_manifest, open_split
from vqpipe.errors import ConfigError, DataError

FACTS = {
    ("imagenet-1k", "train"): (1_281_167, 1000),
    ("imagenet-1k", "val"): (50_000, 1000),
    ("ffhq", "train"): (60_000, None),
    ("ffhq", "val"): (10_000, None),
    ("ffhq", "all"): (70_000, None),
    ("imagenette", "train"): (9_469, 10),
    ("imagenette", "val"): (3_925, 10),
    ("folder", "all"): (None, None),
}


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return root


def test_every_manifest_parses_with_its_facts() -> None:
    found = {}
    for name in ("imagenet-1k", "ffhq", "imagenette", "folder"):
        manifest = load_manifest(name)
        assert manifest.name == name
        assert manifest.licence
        assert manifest.how_to_obtain
        assert manifest.paper_split
        for split, facts in manifest.splits.items():
            found[name, split] = (facts.num_images, facts.num_classes)
    assert found == FACTS
    assert load_manifest("imagenette").split(None)[0] == "train"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data set is named 'imagenet'. Did you mean imagenet"):
        load_manifest("imagenet")
    with pytest.raises(ConfigError, match=r"ffhq has no split 'vall'. Did you mean val"):
        load_manifest("ffhq").split("vall")
    (tmp_path / "own.toml").write_text("name = 'own'\n")
    with pytest.raises(ConfigError, match="no splits"):
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
        check_counts(
            manifest, "train", manifest.splits["train"], open_split(manifest, manifest.splits["train"], tmp_path)
        )


@pytest.fixture
def imagenet() -> tuple[DatasetManifest, Split]:
    return load_manifest("imagenet-1k"), Split(
        num_images=3, num_classes=2, folders=("val",), class_lists=("val_synsets.txt",), devkit="devkit"
    )


def labelled(manifest: DatasetManifest, split: Split, source: Path) -> list[tuple[str, int | None]]:
    images = open_split(manifest, split, source)
    check_counts(manifest, "val", split, images)
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
