import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from stages.prepare_data import prepare_data
from vqpipe.artifacts import open_artifact
from vqpipe.data import prepare as packing
from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.transforms import center_crop
from vqpipe.errors import ArtifactError, DataError

MANIFEST = """
name = "tiny"
title = "Ten drawn images"
licence = "none"
homepage = ""
how_to_obtain = "Draw them."
paper_split = "none"
[splits.train]
num_images = 10
num_classes = 2
folders = ["train"]
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest and its ten images, one of them truncated, in two class folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny.toml").write_text(MANIFEST)
    for i in range(10):
        folder = tmp_path / "copy" / "train" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48 + i, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG" if i < 6 else "PNG")
        data = file.getvalue()
        name = "v1.2.JPEG" if i == 2 else "v1_2.JPEG" if i == 4 else f"{i}.JPEG" if i < 6 else f"{i}.png"
        (folder / name).write_bytes(data[:-99] if i == 3 else data)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def prepare(tiny: Path, out: str = "out", **options: object) -> Path:
    settings = {"shard_size": 4, "max_skipped": 0.2, **options}
    prepare_data(str(tiny / "tiny.toml"), tiny / "copy", tiny / out, **settings)
    return tiny / out


def test_a_folder_is_packed_into_tars(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(tiny)
    artifact = open_artifact(out, "dataset")
    assert capsys.readouterr().out == f"{out}\n"
    assert artifact.facts == {"num_images": 9, "num_classes": 2, "skipped": {"truncated": 1}}
    shards = [f"shard-{k:06d}.tar" for k in range(3)]
    assert artifact.names() == ["samples.parquet", *shards, "skipped.parquet"]

    source, images = open_images(tiny / "copy" / "train"), open_images(out)
    kept = [i for i in range(10) if source.key(i) != "class 1/3"]
    assert [image.image for image in images] == [source.read(i) for i in kept]  # the original bytes
    assert [image.label for image in images] == [source.label(i) for i in kept]
    assert [image.key for image in images][:3] == ["class 0/0", "class 0/6", "class 0/8"]
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert [row["key"] for row in rows] == [image.key for image in images]
    assert [row["source"] for row in rows] == [source.key(i) for i in kept]
    assert [row["shard"] for row in rows] == [shards[0]] * 4 + [shards[1]] * 3 + [shards[2]] * 2
    assert [row["label"] for row in rows] == [image.label for image in images]
    assert len({row["key"] for row in rows}) == 9  # v1.2 and v1_2 stay different keys

    with open(out / shards[0], "rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": shards[0], "stream": file}])))
    assert [sample["__key__"] for sample in theirs] == [image.key for image in images][:4]
    with tarfile.open(out / shards[0]) as tar:
        assert {(member.mtime, member.uname, member.uid) for member in tar} == {(0, "vqpipe", 0)}


def test_bytes_are_equal_when_rerun_resumed_or_with_workers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(tiny)
    expected = tree(out)
    assert prepare(tiny) == out
    assert "already published" in capsys.readouterr().err
    assert tree(prepare(tiny, "workers", num_workers=2)) == expected

    real, written = packing.write_image_shard, list[int]()

    def stop_at_third(draft: object, number: int, *rest: object) -> None:
        if number == 2 and len(written) < 3:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(number)
        real(draft, number, *rest)

    monkeypatch.setattr(packing, "write_image_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny, "resumed")
    assert not (tiny / "resumed").exists()
    assert tree(prepare(tiny, "resumed")) == expected
    assert written == [0, 1, -1, 2]

    with pytest.raises(ArtifactError, match="shard_size was 4, now 5"):
        prepare(tiny, shard_size=5)


def test_image_size_stores_center_crops_as_jpeg(tiny: Path) -> None:
    images, source = open_images(prepare(tiny, image_size=16)), open_images(tiny / "copy" / "train")
    stored = Image.open(io.BytesIO(images[1].image))
    assert (stored.format, stored.size, [part[1:3] for part in stored.layer]) == ("JPEG", (16, 16), [(1, 1)] * 3)
    crop = center_crop(decode(source.read(1)), 16).permute(1, 2, 0).numpy().astype(int)
    assert images[1].key == source.key(1)
    assert np.abs(np.asarray(stored).astype(int) - crop).mean() < 4


def test_color_is_applied_before_the_crop(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colors = set[str]()
    monkeypatch.setattr(packing, "decode", lambda data, color: (colors.add(color), decode(data))[1])
    prepare(tiny, image_size=16, color="srgb")
    assert colors == {"srgb"}


def test_counts_are_checked_against_the_manifest(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"1 of 10 images cannot be used \(1 truncated\), more than the 1 %"):
        prepare(tiny, max_skipped=0.01)
    (tiny / "copy" / "train" / "class 0" / "0.JPEG").unlink()
    with pytest.raises(DataError, match="tiny/train should hold 10 images, found 9"):
        prepare(tiny, "short")
    assert open_artifact(prepare(tiny, "short", allow_partial=True)).facts["num_images"] == 8
    assert "accepted with --allow-partial: tiny/train should hold 10 images" in capsys.readouterr().err


def test_limit_packs_the_first_images_of_a_checked_copy(tiny: Path) -> None:
    manifest = (tiny / "tiny.toml").read_text()
    (tiny / "tiny.toml").write_text(manifest + "num_kept = 10\n")
    images, source = open_images(prepare(tiny, limit=3)), open_images(tiny / "copy" / "train")
    assert [image.key for image in images] == [source.key(i) for i in range(3)]
    (tiny / "tiny.toml").write_text(manifest.replace("10", "11"))
    with pytest.raises(DataError, match="tiny/train should hold 11 images, found 10"):
        prepare(tiny, "other", limit=3)


def test_images_below_min_size_are_excluded_and_counted(tiny: Path) -> None:
    manifest = (tiny / "tiny.toml").read_text() + "min_size = [50, 40]\n"
    (tiny / "tiny.toml").write_text(manifest)
    facts = open_artifact(prepare(tiny)).facts  # widths are 48 to 57, all heights 40
    assert facts == {
        "num_images": 7,
        "num_classes": 2,
        "skipped": {"truncated": 1},
        "excluded": {"smaller than 50x40": 2},
    }
    assert len(open_images(tiny / "out")) == 7
    (tiny / "tiny.toml").write_text(manifest + "num_kept = 8\n")
    with pytest.raises(DataError, match="tiny/train should keep 8 images, 7 are left"):
        prepare(tiny, "other")
    assert open_artifact(prepare(tiny, "other", allow_partial=True)).facts["num_images"] == 7
    (tiny / "tiny.toml").write_text(manifest.replace("[50, 40]", "[58, 40]"))
    with pytest.raises(DataError, match="no image of tiny/train is left"):  # not: too many images cannot be used
        prepare(tiny, "none", max_skipped=0.1)


LAYOUTS = {
    "nested": ('files = ["*/view/*.png"]', {"s1/view/0.png": 0, "s2/view/0.png": 1, "s1/mask/0.png": None}),
    "frames": ('files = ["*/*.png"]\nstride = 2', {"a/0.png": 0, "a/1.png": None, "a/2.png": 1}),
    "listed": (
        'files = ["all/{name}.png"]\nnames = { file = "val.txt" }',
        {"all/7.png": 0, "all/8.png": None, "all/9.png": 1, "val.txt": "7\n9\n"},
    ),
    "numbered": ("numbers = [5, 6]", {"x/5.png": 0, "6.png": 1, "7.png": None}),
    "tars": ('tars = ["*.tar"]', {"0.tar": ("p.png", 0), "1.tar": ("q.png", 1)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_packed_byte_exact(
    layout: str, pack: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rule, files = LAYOUTS[layout]
    pictures = [png_of(number) for number in range(2)]
    for name, content in files.items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            path.write_bytes(pack({content[0]: pictures[content[1]]}))
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_bytes(png_of(99) if content is None else pictures[content])
    head = MANIFEST[: MANIFEST.index("[splits.train]")]
    (tmp_path / "own.toml").write_text(f"{head}[splits.all]\nnum_images = 2\n{rule}\n")
    prepare_data(str(tmp_path / "own.toml"), tmp_path / "copy", tmp_path / "out")
    artifact = open_artifact(tmp_path / "out", "dataset")
    assert artifact.facts == {"num_images": 2, "num_classes": None, "skipped": {}}
    assert [image.image for image in open_images(tmp_path / "out")] == pictures


def png_of(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_loader_processes_start_once_for_all_shards(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = list[int]()
    real = packing.through_workers

    def counted(dataset: Any, work: Any, num_workers: int, timeout: float = 300.0) -> Iterator[Any]:
        began.append(len(list(work)))
        return real(dataset, work, 0)

    monkeypatch.setattr(packing, "through_workers", counted)
    monkeypatch.setattr(packing, "IMAGES_PER_TASK", 2)
    expected = tree(prepare(tiny))
    assert began == [5]  # three shards of 4, 4 and 2 images, in tasks of 2
    monkeypatch.setattr(packing, "IMAGES_PER_TASK", 3)
    assert tree(prepare(tiny, "other")) == expected
    assert began == [5, 5]


def test_verify_archives_checks_their_md5(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = f'[[archives]]\nfile = "a.zip"\nmd5 = "{"0" * 32}"\n'
    (tiny / "tiny.toml").write_text(MANIFEST.replace("[splits.train]", f"{archive}[splits.train]"))
    prepare(tiny, verify_archives=True)
    assert "archives with the published MD5: none" in capsys.readouterr().err
    (tiny / "copy" / "a.zip").write_bytes(b"a")
    prepare(tiny)  # not read without the option
    with pytest.raises(DataError, match=r"a\.zip has the MD5"):
        prepare(tiny, verify_archives=True)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """[rank, world size] of the command; ranks run one after another."""
    from vqpipe import distributed

    state = [0, 2]
    monkeypatch.setattr(distributed, "rank", lambda: state[0])
    monkeypatch.setattr(distributed, "world_size", lambda: state[1])
    return state


def test_ranks_write_disjoint_shards(tiny: Path, ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from vqpipe import distributed

    class Met(Exception):
        pass

    def meet() -> None:
        raise Met

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "barrier", meet)
        for ranks[0] in (0, 1):
            with pytest.raises(Met):
                prepare(tiny)
            records = [json.loads(path.read_text())["name"] for path in (tiny / "out.partial/.records").glob("*")]
            assert sorted(records) == [f"shard-{k:06d}.tar" for k in ((0, 1, 2) if ranks[0] else (0, 2))]
    ranks[:] = [0, 1]
    assert tree(prepare(tiny)) == tree(prepare(tiny, "alone"))
