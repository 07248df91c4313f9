"""Parquet files, zips and lists of paths as `--images`."""

import io
import json
import multiprocessing
import os
import pickle
import stat
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqpipe.data import parquets
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.manifests import load_manifest, open_split
from vqpipe.data.zips import Zips
from vqpipe.errors import DataError

Draw = Callable[..., bytes]
Png = Callable[[int], bytes]

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hugging_face(names: Sequence[str] | None, label: str = "label") -> dict[bytes, bytes]:
    """The metadata that `datasets` adds to a schema."""
    feature = {"dtype": "int64", "_type": "Value"} if names is None else {"names": list(names), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, label: feature}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any] | None = None,
    paths: Sequence[str | None] | None = None,
    metadata: dict[bytes, bytes] | None = None,
    **options: Any,
) -> None:
    rows = [{"bytes": data, "path": name} for data, name in zip(images, paths or [None] * len(images), strict=True)]
    columns = {"image": pa.array(rows, IMAGE_TYPE)} | ({} if labels is None else {"label": pa.array(labels)})
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)


def contents(images: ImageSet) -> list[tuple[str, bytes, int | None]]:
    return [(sample.key, sample.image, sample.label) for sample in images]


def test_parquet_of_datasets_has_its_images_paths_and_classes(draw: Draw, tmp_path: Path) -> None:
    data = [draw(i) for i in range(5)]
    # In datasets class numbers are in the order of the metadata, not of the alphabet.
    write_parquet(
        tmp_path / "train.parquet",
        data,
        [1, 0, 1, -1, None],
        ["n01/a.JPEG", "n02/a.JPEG", "/abs/../b.png", "c.d.png", "e"],
        hugging_face(["tench", "goldfish"]),
        row_group_size=2,
    )
    images = open_images(tmp_path / "train.parquet")
    keys = ["n01/a", "n02/a", "abs/b", "c.d", "e"]
    assert contents(images) == list(zip(keys, data, [1, 0, 1, None, None], strict=True))
    assert (images.class_names, images.num_classes, images.left_out) == (("tench", "goldfish"), 2, {})
    assert images.origin(3) == ("train.parquet", 3)
    assert contents(pickle.loads(pickle.dumps(images))) == contents(images)


def test_parquet_with_large_types_has_its_paths_and_classes(draw: Draw, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])  # as polars writes them
    images = pa.array([{"bytes": draw(0), "path": "a/x.png"}, {"bytes": draw(1), "path": "b/x.png"}], kind)
    labels = pa.array(["dog", "cat"], pa.large_string())
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "a.parquet")
    assert contents(open_images(tmp_path / "a.parquet")) == [("a/x", draw(0), 1), ("b/x", draw(1), 0)]


def test_parquet_without_distinct_paths_has_file_and_row_as_keys(draw: Draw, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", [draw(0), draw(1)], paths=["x.jpg", "x.jpg"])
    for spec in (f"{tmp_path}/*.parquet", f"{tmp_path}/{{a,b}}.parquet", str(tmp_path)):
        images = open_images(spec)
        assert [sample.key for sample in images] == ["a/0", "a/1", "b/0", "b/1"]
        assert images.origin(3) == ("b.parquet", 1)
        assert images.num_classes is None
    (tmp_path / "other").mkdir()
    write_parquet(tmp_path / "other" / "a.parquet", [draw(2)])
    images = open_images(f"{tmp_path}/**/a.parquet")
    assert [sample.key for sample in images] == [f"{tmp_path.name}/a/0", f"{tmp_path.name}/a/1", "other/a/0"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_plain_bytes_and_class_names(draw: Draw, tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table(
        {
            "jpg": pa.array([draw(0), draw(1), draw(2)], pa.large_binary()),
            "mask": pa.array([b"", b"", b""], pa.binary()),
            "class": pa.array(["dog", "cat", None], pa.string()).cast(kind),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert contents(images) == [("a/0", draw(0), 1), ("a/1", draw(1), 0), ("a/2", draw(2), None)]
    assert images.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "numbers", "class_names", "unlabeled"),
    [
        ([" cat", "cat", "-1", "", None], [0, 0, None, None, None], ("cat",), ""),
        (["10", "7.0", "-1", "", None], [10, 7, None, None, None], (), ""),
        (["10", "9", "x", "-1", ""], [0, 1, 2, None, None], ("10", "9", "x"), ""),
        (["10", "-7", "x", "-1", ""], [None] * 5, (), "a.parquet: a label is not a class: '-7'"),
    ],
)
def test_labels_in_texts_of_parquet(
    draw: Draw,
    tmp_path: Path,
    labels: list[str | None],
    numbers: list[int | None],
    class_names: tuple[str, ...],
    unlabeled: str,
) -> None:
    write_parquet(tmp_path / "a.parquet", [draw(0)] * 5, labels)
    images = open_images(tmp_path / "a.parquet")
    assert [image.label for image in images] == numbers
    assert (images.class_names, images.unlabeled) == (class_names, unlabeled)


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_with_encodings_of_bytes(draw: Draw, tmp_path: Path, kind: pa.DataType, statistics: bool) -> None:
    data = pa.array([draw(0), None, draw(2)], pa.binary())
    stored = data.dictionary_encode() if pa.types.is_dictionary(kind) else data.cast(kind)
    pq.write_table(pa.table({"image": stored}), tmp_path / "a.parquet", write_statistics=statistics)
    images = open_images(tmp_path / "a.parquet")
    assert contents(images) == [("a/0", draw(0), None), ("a/2", draw(2), None)]


@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_rows_without_bytes_are_counted(draw: Draw, tmp_path: Path, statistics: bool) -> None:
    data = [draw(0), None, draw(2), None, draw(4)]
    path = tmp_path / "a.parquet"
    write_parquet(path, data, [0, 1, 2, 3, 4], row_group_size=2, write_statistics=statistics)
    images = open_images(path)
    assert contents(images) == [("a/0", draw(0), 0), ("a/2", draw(2), 2), ("a/4", draw(4), 4)]
    assert images.left_out == {"row without image bytes": 2}
    assert [images.origin(i)[1] for i in range(3)] == [0, 2, 4]
    write_parquet(path, [None, None], paths=["a.jpg", "b.jpg"])
    with pytest.raises(DataError, match="has only the paths of its images, not their bytes"):
        open_images(path)


def test_parquet_row_group_is_read_once_for_consecutive_images(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", [draw(i) for i in range(12)], row_group_size=4)
    images = open_images(tmp_path / "a.parquet")
    opened = list[str]()
    real = parquets.open_parquet
    monkeypatch.setattr(parquets, "open_parquet", lambda url: (opened.append(url), real(url))[1])
    parquets.read_group.cache_clear()
    assert [images.read(i) for i in range(12)] == [draw(i) for i in range(12)]
    assert len(opened) == 3
    assert images.whole_groups
    with multiprocessing.get_context("fork").Pool(2) as pool:  # with a row group in memory
        assert pool.map(images.read, range(12)) == [draw(i) for i in range(12)]


def test_parquet_digest_is_that_of_the_content(draw: Draw, tmp_path: Path) -> None:
    for folder, last in (("a", 2), ("b", 2), ("c", 3)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.parquet"
        write_parquet(path, [draw(1), draw(last)], [0, 1])
        os.utime(path, (1e9, 1e9))  # old enough to be cached
    digests = [open_images(tmp_path / folder).digest for folder in "abca"]
    assert digests[0] == digests[1] == digests[3] != digests[2]
    os.rename(tmp_path / "b" / "x.parquet", tmp_path / "b" / "y.parquet")
    assert open_images(tmp_path / "b").digest != digests[1]  # other keys
    images = open_images(tmp_path / "a")
    parquets.read_group.cache_clear()
    write_parquet(tmp_path / "a" / "x.parquet", [draw(3), draw(4)], [0, 1])
    with pytest.raises(DataError, match="changed after it was indexed"):
        images.read(0)


def test_parquets_that_cannot_be_read_are_errors(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"caption": ["a"], "url": ["b"]}), path)
    with pytest.raises(DataError, match="is a Parquet file without a column of image bytes: it has caption, url"):
        open_images(path)
    pq.write_table(pa.table({"one": [b"a"], "two": [b"b"]}), path)
    with pytest.raises(DataError, match="several columns of bytes: one, two"):
        open_images(path)
    write_parquet(path, [draw(0)], [1], metadata=hugging_face(["cat"]))
    with pytest.raises(DataError, match=r"classes 1 to 1 in its column label. Numbers from 0 to 0 are"):
        open_images(path)
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match="is an HTML page, not a Parquet file"):
        open_images(path)
    write_parquet(path, [draw(i) for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_images(path)
    path.write_bytes(whole.replace(b"bytes", b"\xffytes"))  # no UTF-8 in a name
    with pytest.raises(DataError, match=r"a\.parquet"):
        open_images(path)
    path.write_bytes(whole)
    monkeypatch.setattr(parquets, "LARGEST_GROUP", 100)
    parquets.read_group.cache_clear()
    with pytest.raises(DataError, match="in one row group, which is read as a whole"):
        open_images(path).read(0)


def test_parquet_damaged_in_a_row_group_is_an_error(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [draw(i) for i in range(3)], compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the header of the first page
    path.write_bytes(data)
    images = open_images(path)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        images.read(0)


def test_parquet_with_two_columns_of_classes_says_why_it_has_no_labels(draw: Draw, tmp_path: Path) -> None:
    features = {"coarse": {"names": ["a"], "_type": "ClassLabel"}, "fine": {"names": ["b"], "_type": "ClassLabel"}}
    table = pa.table({"image": pa.array([{"bytes": draw(0)}], IMAGE_TYPE), "coarse": [0], "fine": [0]})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert images.num_classes is None
    assert "several columns are classes: coarse, fine" in images.unlabeled


@pytest.mark.parametrize(("names", "class_names"), [([1, "1"], ()), ([["a"], ["b"]], ("['a']", "['b']"))])
def test_unusual_class_names_of_parquet(
    draw: Draw, tmp_path: Path, names: Sequence[Any], class_names: tuple[str, ...]
) -> None:
    write_parquet(tmp_path / "a.parquet", [draw(0)], [0], metadata=hugging_face(names))
    images = open_images(tmp_path / "a.parquet")
    assert (images.labels.tolist(), images.class_names) == ([0], class_names)


def test_folder_of_several_splits_is_an_error(draw: Draw, tmp_path: Path) -> None:
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(data / f"{name}.parquet", [draw(0)])
    with pytest.raises(DataError, match=r"several splits: test, train\. Give one: '.*/test\*\.parquet'"):
        open_images(data)
    assert len(open_images(f"{data}/train*.parquet")) == 2
    with pytest.raises(DataError, match=rf"Give them, as '{data}/test\*\.parquet'"):
        open_images(data.parent)


def test_hidden_files_of_a_folder_of_parquet_are_left_out(draw: Draw, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / ".cache").mkdir(parents=True)
    write_parquet(data / ".cache" / "train-00000-of-00001.parquet", [draw(0)])
    with pytest.raises(DataError, match=r"data holds no images \(left out: 1 hidden folder\)"):
        open_images(data)
    write_parquet(data / "train-00000-of-00001.parquet", [draw(0)])
    (data / "._train-00000-of-00001.parquet").write_bytes(b"\0\5\x16\7")  # beside every file on a disk of macOS
    assert len(open_images(data)) == 1


def test_list_of_paths_is_read_in_its_order(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.jpg", "sub/b c.jpg", "é.png")):
        (tmp_path / name).write_bytes(draw(i))
    path = tmp_path / "list.txt"
    path.write_text("# chosen\né.png\r\n\n sub/b c.jpg\n./a.jpg", encoding="utf-8")
    images = open_images(path)
    assert contents(images) == [("é", draw(2), None), ("sub/b c", draw(1), None), ("a", draw(0), None)]
    assert images.name == "list.txt"
    (tmp_path / "lists").mkdir()
    outside = tmp_path / "lists" / "all.lst"
    outside.write_text(f"../a.jpg\n{tmp_path}/sub/b c.jpg\n")
    assert [sample.key for sample in open_images(outside)] == ["a", "sub/b c"]


@pytest.mark.parametrize(
    ("name", "text", "labels", "class_names"),
    [
        ("a.csv", "id,file_name,label\n0,0.png,5\n1,1.png,\n", [5, None], ()),
        ("a.csv", 'file,label\n"0.png",dog\n1.png,cat\n', [1, 0], ("cat", "dog")),
        ("a.csv", "path,label\n0.png,3.0\n1.png,-1\n", [3, None], ()),
        ("a.csv", "path,label\n0.png,2_1\n1.png,10_2\n", [1, 0], ("10_2", "2_1")),
        ("a.tsv", "\ufeffimage\tcaption\n0.png\ta, b\n1.png\tc\n", [None, None], ()),
        ("a.csv", "path,label\n0.png, cat\n1.png,-1\n", [0, None], ("cat",)),
        ("a.csv", "path,label\n0.png,07\n1.png,x\n", [0, 1], ("07", "x")),
        ("a.jsonl", '{"key": "0.png", "label": 1.0}\n{"key": "1.png", "label": "-1"}', [1, None], ()),
        ("a.jsonl", '{"key": "0.png", "label": 2}\n\n{"key": "1.png", "label": "0"}', [2, 0], ()),
    ],
)
def test_lists_with_columns(
    draw: Draw, tmp_path: Path, name: str, text: str, labels: list[int | None], class_names: tuple[str, ...]
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(draw(i))
    (tmp_path / name).write_text(text, encoding="utf-8")
    images = open_images(tmp_path / name)
    assert contents(images) == list(zip("01", [draw(0), draw(1)], labels, strict=True))
    assert images.class_names == class_names


def test_class_names_of_a_list_are_in_its_digest(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(draw(0))
    digests = set()
    for name in ("cat", "dog", "cat"):
        (tmp_path / "a.csv").write_text(f"path,label\n0.png,{name}\n")
        digests.add(open_images(tmp_path / "a.csv").digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.txt",
            "0.png\nb.png\n0.png\nc.png",
            r"a\.txt lists 2 of 4 files that do not exist, the first in line 2: b\.png",
        ),
        ("a.txt", "0.png 7\n", "Lists with labels are CSV"),
        ("a.txt", "s3://bucket/0.png", "A list names local files"),
        ("a.txt", "0.png\n\n./0.png", r"lists \./0\.png in line 1 and again in line 3"),
        ("a.txt", "# nothing\n", "lists no images"),
        ("a.txt", "<html>", "is an HTML page, not a list of paths"),
        ("a.txt", "[1]", "is a JSON file, not a list of paths"),
        ("a.csv", "url,label\nx,1\n", "has no column of paths; its columns are url, label"),
        ("a.csv", "path,label\n0.png,-2\n", "has the label -2 in line 2"),
        ("a.csv", "path,label\n,1\n", "has no path in line 2"),
        ("a.jsonl", '{"path": "0.png"}\n[]\n', "has no JSON object in line 2"),
        ("a.jsonl", '{"path": "0.png", "label": true}\n', "has the label True in line 1"),
        ("a.jsonl", '{"path": "0.png", "label": [1]}\n', r"has the label \[1\] in line 1"),
        ("a.jsonl", '{"path": 3}\n', "has a wrong type in line 1"),
        ("a.csv", "path,label\n0.png,caf\udce9\n", r"a\.csv is not UTF-8: see the label in line 2"),
    ],
)
def test_invalid_lists_are_errors(draw: Draw, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "0.png").write_bytes(draw(0))
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / name)


def pack_zip(path: Path, members: Mapping[Any, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_as_the_folder_that_was_packed(draw: Draw, tmp_path: Path, method: int) -> None:
    members = {"a-b/x.png": draw(0), "a/y.png": draw(1), "a/y.jpg": draw(2), "../a/z.png": draw(3)}
    others = {"a/notes.txt": b"1", "__MACOSX/a/._y.png": b"1", ".hidden/x.png": b"1", "empty/": b""}
    others |= {".y.png": b"1", "README": b"1", "LICENSE": b"1"}
    pack_zip(tmp_path / "all.zip", {f"photos/{name}": data for name, data in (members | others).items()}, method)
    folder = tmp_path / "photos"
    for name, data in members.items():
        file = folder / name.removeprefix("../")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (folder / "empty").mkdir()
    images = open_images(tmp_path / "all.zip")
    assert contents(images) == contents(open_images(folder))
    assert images.class_names == open_images(folder).class_names == ("a", "a-b", "empty")
    assert images.remarks == ["left out: 2 files without an extension, 2 hidden files, 1 .txt, 1 system folder"]
    assert images.origin(1) == ("all.zip", 1)
    assert not (tmp_path / "a").exists()
    assert contents(pickle.loads(pickle.dumps(images))) == contents(images)


def test_flat_zip_has_no_classes(draw: Draw, tmp_path: Path) -> None:
    pack_zip(tmp_path / "a.zip", {"x/1.png": draw(1), "x/2.png": draw(2)})
    assert contents(open_images(tmp_path / "a.zip")) == [("1", draw(1), None), ("2", draw(2), None)]
    pack_zip(tmp_path / "b.zip", {"x/1.png": draw(1), "y/1.png": draw(3), "2.png": draw(2)})
    images = open_images(tmp_path / "b.zip")
    assert [sample.key for sample in images] == ["2", "x/1", "y/1"]
    assert images.num_classes is None
    assert images.unlabeled == "b.zip has 2.png outside of its folders"
    assert len(open_images(f"{tmp_path}/*.zip")) == 5


@pytest.mark.parametrize("folder", ["", "pets/"])
def test_lists_of_labels_in_a_zip_are_named(draw: Draw, tmp_path: Path, folder: str) -> None:
    members = {"cat/1.png": draw(1), "dog/1.png": draw(2)}
    members |= dict.fromkeys(("labels.csv", "classes.txt", "cat/labels.json"), b"")
    pack_zip(tmp_path / "a.zip", {f"{folder}{name}": data for name, data in members.items()})
    images = open_images(tmp_path / "a.zip")
    assert images.class_names == ("cat", "dog")
    assert images.unlabeled == "a.zip has classes.txt, labels.csv: unpack it to use such lists"


def test_links_in_a_zip_are_left_out(draw: Draw, tmp_path: Path) -> None:
    links = [zipfile.ZipInfo(name) for name in ("a/link.png", "b/link")]
    for link in links:
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
    pack_zip(tmp_path / "a.zip", {"a/1.png": draw(1)} | dict.fromkeys(links, b"1.png"))
    images = open_images(tmp_path / "a.zip")
    assert contents(images) == [("1", draw(1), None)]
    assert images.remarks == ["left out: 2 symbolic links"]


def test_zip_digest_and_cache(draw: Draw, tmp_path: Path) -> None:
    for name, last in (("a", 1), ("b", 1), ("c", 2)):
        pack_zip(tmp_path / f"{name}.zip", {"0.png": draw(0), "1.png": draw(last)})
        os.utime(tmp_path / f"{name}.zip", (1e9, 1e9))
    first, copy, other, again = (open_images(tmp_path / f"{name}.zip") for name in "abca")
    assert first.digest == again.digest != other.digest
    assert contents(first) == contents(again) == contents(copy)
    assert list(tmp_path.glob("cache/vqpipe/index/*"))


def patch(path: Path, name: bytes, offset: int, value: bytes) -> None:
    """Change bytes of the entry of a member in the central directory."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(name) - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, b"\1", "is encrypted"),
        (10, b"\x09", "a.png is compressed with deflate64. Unpack it"),
        (34, b"\1", "is split into several files"),
        (24, (1 << 31).to_bytes(4, "little"), "a.png has 2,147,483,648 bytes, too many for an image"),
    ],
)
def test_zips_that_cannot_be_read_are_errors(
    draw: Draw, tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    path = tmp_path / "s.zip"
    pack_zip(path, {"a.png": draw(0)})
    patch(path, b"a.png", offset, value)
    with pytest.raises(DataError, match=rf"s\.zip.*{message}"):
        open_images(path)


def test_damaged_zips_are_errors(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    pack_zip(path, {"a.png": draw(0)})
    whole = path.read_bytes()
    for position in (60, 0):  # in the compressed data; in the local header
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"s\.zip (is damaged in a|has no member at byte 0)"):
            open_images(path).read(0)
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match="damaged or split zip archive"):
        open_images(path)
    path.write_bytes(b"<html>login")
    with pytest.raises(DataError, match="is an HTML page, not a zip archive"):
        open_images(path)
    pack_zip(path, {"a.txt": b"1"})
    with pytest.raises(DataError, match=r"s\.zip holds no images. It holds 1 x \.txt"):
        open_images(path)


def test_damage_anywhere_in_a_zip_is_an_error_or_harmless(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    pack_zip(path, {"x/a.png": draw(0), "y/b.png": draw(1)})
    whole = path.read_bytes()
    expected = {draw(0), draw(1)}
    for position in [*range(60), *range(len(whole) - 150, len(whole))]:
        data = bytearray(whole)
        data[position] = 0xFF
        path.write_bytes(data)
        with suppress(DataError):
            assert {sample.image for sample in open_images(path)} <= expected


def test_zip_member_is_not_decompressed_beyond_its_size(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    pack_zip(path, {"a.png": b"\0" * 50_000_000})
    patch(path, b"a.png", 24, (100).to_bytes(4, "little"))
    images = open_images(path)
    assert isinstance(images.sources[0], Zips)
    with pytest.raises(DataError, match="is damaged in a"):
        images.read(0)


def test_files_are_known_by_their_first_bytes_where_the_name_says_nothing(draw: Draw, tmp_path: Path) -> None:
    write_parquet(tmp_path / "one", [draw(0)])
    pack_zip(tmp_path / "two", {"a.png": draw(1)})
    assert [sample.image for sample in open_images([tmp_path / "one", tmp_path / "two"])] == [draw(0), draw(1)]
    with pytest.raises(DataError, match="names files of several kinds"):
        open_images(f"{tmp_path}/*o*")


def test_forms_are_read_from_a_remote_file_system(draw: Draw, tmp_path: Path) -> None:
    import fsspec

    write_parquet(tmp_path / "a.parquet", [draw(0), None, draw(2)], [1, 0, 0], row_group_size=1)
    pack_zip(tmp_path / "a.zip", {"x/a.png": draw(1), "y/a.png": draw(2)})
    system = fsspec.filesystem("memory")
    for name in ("a.parquet", "a.zip"):
        system.pipe(f"/forms/{name}", (tmp_path / name).read_bytes())
        remote, local = open_images(f"memory://forms/{name}"), open_images(tmp_path / name)
        assert contents(remote) == contents(local)
        assert remote.digest == local.digest
    assert len(io.BytesIO(draw(0)).read()) > 0


def test_prepare_data_packs_what_images_takes(draw: Draw, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [draw(0), draw(1)], ["dog", "cat"], ["x.jpg", "y.jpg"])
    manifest = load_manifest("folder")
    _, split = manifest.split(None)
    assert contents(open_split(manifest, split, f"{tmp_path}/*.parquet")) == [("x", draw(0), 1), ("y", draw(1), 0)]


def test_sources_with_the_same_class_names_keep_their_numbers(draw: Draw, tmp_path: Path) -> None:
    for name, names in (("a", ["b", "a"]), ("b", ["b", "a"]), ("c", ["c"])):
        write_parquet(tmp_path / f"{name}.parquet", [draw(0)], [0], metadata=hugging_face(names))
    same = open_images([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert (same.class_names, same.labels.tolist()) == (("b", "a"), [0, 0])
    union = open_images([tmp_path / "a.parquet", tmp_path / "c.parquet"])
    assert (union.class_names, union.labels.tolist()) == (("a", "b", "c"), [1, 2])
