import inspect
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vqpipe import artifacts
from vqpipe.data import sources
from vqpipe.data.folders import Folder
from vqpipe.data.images import Sample, SelectedImages, open_images
from vqpipe.data.sources import NO_LABEL
from vqpipe.errors import ArtifactError, DataError

Pack = Callable[..., bytes]
Draw = Callable[..., bytes]


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def keys(*specs: str | Path) -> list[str]:
    return [sample.key for sample in open_images(specs)]


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    write(tmp_path, "n2/b.png", "n1/deep/er/a.JPEG", "n1/z.jpg", "n10/c.webp", "n10/notes.txt", ".git/x.png")
    (tmp_path / "n11").mkdir()  # an empty folder is a class: a missing download must not renumber the others
    images = open_images([tmp_path])
    assert [(images.key(i), images.label(i)) for i in range(4)] == [
        ("n1/deep/er/a", 0),
        ("n1/z", 0),
        ("n10/c", 1),
        ("n2/b", 3),
    ]
    assert (images.num_classes, images.class_names) == (4, ("n1", "n10", "n11", "n2"))
    assert images[1] == Sample("n1/z", b"n1/z.jpg", 0)
    assert images[-1].key == "n2/b"
    with pytest.raises(IndexError):
        images[4]


def test_artifacts_among_the_images_are_neither_read_nor_classes(tmp_path: Path) -> None:
    write(tmp_path, "ant/a.png", "zebra/b.png")
    before = open_images([tmp_path])
    draft = artifacts.start(tmp_path / "decoded", "images", {}, {})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        draft.write_bytes("images/x.png", b"x")
        unfinished = open_images([tmp_path])
        draft.publish({})
    finished = open_images([tmp_path])
    assert unfinished.digest == finished.digest == before.digest
    assert unfinished.class_names == finished.class_names == ("ant", "zebra")
    assert unfinished.left_out == finished.left_out == {"vqpipe artifact": 1}


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a.png", "sub/c.png", "._a.png", "a.jpg")
    images = open_images([tmp_path])
    assert [sample.key for sample in images] == ["a.jpg", "a.png", "b", "sub/c"]  # a.* keep their extensions
    assert images.num_classes is None
    assert images.label(0) is None


EXCLUDED_FORMATS = {
    *("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "PDF", "PALM", "FPX", "MIC", "IPTC", "FITS"),
    *("IMT", "MCIDAS", "SPIDER", "XVTHUMB"),
}


def test_every_extension_of_pillow_is_read_or_excluded_for_a_reason(tmp_path: Path) -> None:
    extensions = Image.registered_extensions()
    assert not set(Image.OPEN) - set(sources.FORMATS) - EXCLUDED_FORMATS
    source = inspect.getsource(sources)
    assert all(name in source for name in EXCLUDED_FORMATS)  # each with its reason in the comment of FORMATS
    for extension, name in extensions.items():
        write(tmp_path, f"{name}{extension}.{extension[1:].upper()}")
    read = {name.partition(".")[0] for name in keys(tmp_path)}
    assert read == set(extensions.values()) - EXCLUDED_FORMATS
    assert set(extensions) - {f".{name}" for name in sources.IMAGE_EXTENSIONS} == {
        *(extension for extension, name in extensions.items() if name in EXCLUDED_FORMATS),
        ".pfm",
    }


def test_what_a_folder_leaves_out_is_counted_by_reason(tmp_path: Path) -> None:
    write(tmp_path, "c1/a.jpg", "c1/notes.txt", "c2/b.JFIF", "c2/shard.tar", "c2/LICENSE", "c2/.hidden.png", "c1/x.a b")
    write(tmp_path, "@eaDir/t.jpg", "__MACOSX/t.jpg", "c1/.ipynb_checkpoints/a.jpg", "lost+found/u.png", ".git/x.png")
    for i in range(4):
        (tmp_path / "c2" / f"link{i}.jpg").symlink_to(f"gone/{i}.jpg")
    (tmp_path / "c2" / "loop.png").symlink_to("loop.png")
    (tmp_path / "c2" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "c2" / "pipe.png")
    images = open_images([tmp_path])
    assert ([images.key(i) for i in range(2)], images.class_names, len(images)) == (["c1/a", "c2/b"], ("c1", "c2"), 2)
    assert images.left_out == {
        "dead link": 5,
        "system folder": 4,
        ".tar": 1,
        ".txt": 1,
        "file without an extension": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "link to an enclosing folder": 1,
        "other file": 1,
        "special file": 1,
    }
    (line,) = images.remarks
    assert line.startswith("left out: 5 dead links, 4 system folders, 1 .tar, 1 .txt, 1 file without an extension")
    assert open_images([write(tmp_path / "clean", "a.png")]).facts == {}


def test_an_unreadable_subfolder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    real = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list .*/b: Permission denied\. Check its permissions\.$"):
        open_images([tmp_path])


def test_a_stray_picture_beside_class_folders_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", "cat/1.png", "dog/2.png", "preview.jpg")
    images = open_images([root])
    assert images.num_classes is None
    assert images.unlabeled == ("pets/preview.jpg lies beside the class folders: without it, the images have 2 classes")
    assert images.facts == {"unlabeled": images.unlabeled}
    assert images.remarks == [f"unlabeled: {images.unlabeled}"]
    write(root, "z.png")
    assert "preview.jpg and 1 more lie beside" in open_images([root]).unlabeled
    assert open_images([write(tmp_path / "flat", "1.png", "2.png")]).unlabeled == ""


def test_decimal_class_names_are_in_numeric_order(tmp_path: Path) -> None:
    first = write(tmp_path / "one", "10/a.png", "2/b.png", "0/c.png")
    second = write(tmp_path / "two", "1/d.png", "10/e.png")
    assert open_images([first]).class_names == ("0", "2", "10")
    images = open_images([first, second])
    assert images.class_names == ("0", "1", "2", "10")
    assert [(images.key(i), images.label(i)) for i in range(5)] == [
        ("0/c", 0),
        ("2/b", 2),
        ("10/a", 3),
        ("1/d", 1),
        ("10/e", 3),
    ]
    assert open_images([write(tmp_path / "three", "10/a.png", "2/b.png", "x/c.png")]).class_names == ("10", "2", "x")


def test_classes_txt_numbers_the_class_folders(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", "cat/1.png", "dog/2.png")
    (root / "classes.txt").write_text("dog\nzebra\ncat\n")
    images = open_images([root])
    assert (images.class_names, images.labels.tolist(), images.left_out) == (("dog", "zebra", "cat"), [0, 2], {})
    joined = open_images([write(tmp_path / "more", "zebra/3.png"), root])
    assert (joined.class_names, joined.labels.tolist()) == (("dog", "zebra", "cat"), [1, 0, 2])
    write(root, "bird/3.png")
    with pytest.raises(DataError, match=r"the class folder .*/pets/bird is not in classes.txt"):
        open_images([root])
    (root / "classes.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(DataError, match=r"classes.txt names the class 'dog' twice"):
        open_images([root])


LISTS = {
    "labels.csv": b"\xef\xbb\xbffile_name,label\r\na/1.png,dog\r\n./2,cat\r\ngone.png,dog\r\n",
    "labels.json": b'[{"key": "a/1", "label": "dog"}, {"key": "2.png", "label": "cat"}, {"key": "x", "label": "dog"}]',
    "metadata.csv": b'text,file_name,label\n"a, b",a/1.png,dog\nc,2.png,cat\nd,gone.png,dog\n',
    "metadata.jsonl": b'{"file_name": "a/1.png", "label": "dog"}\n{"file_name": "2.png", "label": "cat"}\n'
    b'{"file_name": "gone.png", "label": "dog"}\n',
}


@pytest.mark.parametrize("name", [*LISTS, "labels.parquet"])
def test_a_list_labels_the_images_of_a_folder(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "photos", "a/1.png", "2.png", "3.png")
    if name == "labels.parquet":
        table = {"file_name": ["a/1.png", "2", "gone"], "label": ["dog", "cat", "dog"], "other": [1, 2, 3]}
        pq.write_table(pa.table(table), root / name)
    else:
        (root / name).write_bytes(LISTS[name])
    images = open_images([root])
    assert [(images.key(i), images.label(i)) for i in range(3)] == [("2", 0), ("3", None), ("a/1", 1)]
    assert images.class_names == ("cat", "dog")
    assert images.unlabeled == f"1 of 3 images have no label in {name}"
    assert images.left_out == {"label without an image": 1}
    (root / "classes.txt").write_text("dog\ncat\n")
    again = open_images([root])
    assert (again.class_names, again.labels.tolist()) == (("dog", "cat"), [1, NO_LABEL, 0])
    assert again.digest != images.digest


def test_lists_with_line_ends_of_unicode_in_their_text(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", "text": "one\u2028two\x85", "label": f"{3 - i}"} for i in (1, 2)]
    (root / "metadata.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    images = open_images([root])
    assert (images.labels.tolist(), images.remarks) == ([2, 1], [])


def test_lists_of_numbers_and_unusable_lists(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "a/1.png", "b/2.png")

    def opened(text: str, name: str = "labels.csv") -> tuple[list[int], tuple[str, ...], str]:
        for old in root.glob("*.*"):
            old.unlink()
        (root / name).write_text(text)
        images = open_images([root])
        return images.labels.tolist(), images.class_names, images.unlabeled

    assert opened("key,label\na/1,7\nb/2,3\n") == ([7, 3], (), "")
    assert opened("key,label\na/1,999999\nb/2,3\n") == ([999_999, 3], (), "")
    assert opened("key,label\na/1,10.0\nb/2,9.0\n") == ([10, 9], (), "")  # as pandas writes numbers beside gaps
    assert opened("key,label\na/1,2_1\nb/2,10_2\n") == ([1, 0], ("10_2", "2_1"), "")
    assert opened('{"a/1.png": 5, "b/2": -1}', "labels.json")[:2] == ([5, NO_LABEL], ())
    for text, reason in (
        ("key,label\na/1,7\nb/2,cat\n", "labels.csv holds class names, as 'cat', and numbers, as 7"),
        ("key,label\na/1,-7\n", "labels.csv: the label of a/1 is not a class: '-7'"),
        ("key,label\na/1,7\na/1,8\n", "labels.csv has two labels for a/1"),
        (
            "key,label\na/1,1000000000\nb/2,1\n",
            "the label 1000000000 of a/1 would make 1,000,000,001 classes of 2 images",
        ),
    ):
        assert opened(text) == ([NO_LABEL, NO_LABEL], (), reason)
    assert opened("text\nx\n", "metadata.csv") == ([0, 1], ("a", "b"), "")  # captions: the folders are the classes
    assert opened("key,label\na/1,\nb/2,-1\n") == ([0, 1], ("a", "b"), "")
    reason = "no label of labels.csv is that of an image: the class folders are the labels"
    assert opened("key,label\n1.png,7\n2.png,3\n") == ([0, 1], ("a", "b"), reason)
    labels, _, reason = opened('{"a/1": ', "labels.json")
    assert labels == [NO_LABEL, NO_LABEL]
    assert "labels.json is damaged" in reason
    (root / "labels.json").write_text('{"a/1": "cat"}')
    (root / "classes.txt").write_text("dog\n")
    with pytest.raises(DataError, match=r"the class 'cat' of labels.json is not in classes.txt"):
        open_images([root])
    (root / "labels.json").write_text('{"a/1": 1}')
    assert open_images([root]).unlabeled == "labels.json holds the label 1, classes.txt names 1 classes"


def test_keys_of_several_shards_are_compared_and_prefixed(tmp_path: Path, pack: Pack) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(
            pack({f"{i}.png": name.encode() for i in range(3)} | {f"{name}9.png": b""})
        )
    names = [tmp_path / "a.tar", f"{tmp_path}/{{b,c}}.tar"]
    images = open_images(names)
    assert images.facts == {"duplicate_keys": 3}
    assert images.remarks == ["duplicate keys: 3 keys are each those of several images, as 0 in a.tar and b.tar"]
    prefixed = open_images(names, key_prefix="shard")
    assert [prefixed.key(i) for i in (0, 3, 4, 11)] == ["a/0", "a/a9", "b/0", "c/c9"]
    assert prefixed.facts == {}
    assert prefixed.digest != images.digest
    os.rename(tmp_path / "c.tar", tmp_path / "d.tar")
    renamed = [tmp_path / "a.tar", f"{tmp_path}/{{b,d}}.tar"]
    assert open_images(renamed).digest == images.digest
    assert open_images(renamed, key_prefix="shard").digest != prefixed.digest  # other keys
    folders = [write(tmp_path / name, "x/1.png") for name in ("train", "val")]
    assert open_images(folders).facts == {"duplicate_keys": 1}
    assert [image.key for image in open_images(folders, key_prefix="shard")] == ["train/x/1", "val/x/1"]


def test_prefixes_of_shards_of_one_name_are_distinct(tmp_path: Path, pack: Pack) -> None:
    for number, name in enumerate(("train/0.tar", "val/0.tar", "val/1.tar")):
        write(tmp_path, name).joinpath(name).write_bytes(pack({"x.png": bytes([number])}))
    specs = [tmp_path / "train" / "0.tar", f"{tmp_path}/val/{{0,1}}.tar"]
    images = open_images(specs, key_prefix="shard")
    assert [image.key for image in images] == ["train/0/x", "val/0/x", "val/1/x"]
    assert [images.origin(i) for i in range(3)] == [("train/0.tar", 0), ("val/0.tar", 0), ("val/1.tar", 0)]
    assert [image.key for image in SelectedImages(images, np.array([1, 0]))] == ["val/0/x", "train/0/x"]
    assert images.facts == {}
    remark = "duplicate keys: 1 key is that of several images, as x in train/0.tar and val/0.tar"
    assert open_images(specs).remarks == [remark]
    twice = open_images([specs[0], specs[0]], key_prefix="shard")
    assert [image.key for image in twice] == ["0/x", "0/x"]


def test_prefixes_of_folders_of_one_name_are_distinct(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, "1.png") for name in ("a/images", "b/images")]
    images = open_images(folders, key_prefix="shard")
    assert [image.key for image in images] == ["a/images/1", "b/images/1"]
    assert [images.origin(i) for i in range(2)] == [("a/images", 0), ("b/images", 0)]
    assert open_images(folders).remarks == [
        "duplicate keys: 1 key is that of several images, as 1 in a/images and b/images"
    ]
    for folder in folders:
        (folder.parent / "mine.txt").write_text("images/1.png\n")
    lists = open_images([folder.parent / "mine.txt" for folder in folders], key_prefix="shard")
    assert [image.key for image in lists] == ["a/mine/images/1", "b/mine/images/1"]
    patterns = open_images([f"{folder}/*.png" for folder in folders], key_prefix="shard")
    assert len({image.key for image in patterns}) == 2
    twice = open_images([folders[0], folders[0]], key_prefix="shard")
    assert [image.key for image in twice] == ["images/1", "images/1"]


@pytest.mark.parametrize("extension", [".txt", ".lst", ".csv", ".tsv", ".jsonl"])
def test_prefix_of_the_images_of_a_list_is_its_name_without_the_extension(tmp_path: Path, extension: str) -> None:
    write(tmp_path, "1.png")
    lines = {".csv": "path\n1.png\n", ".tsv": "path\n1.png\n", ".jsonl": '{"path": "1.png"}\n'}
    (tmp_path / f"mine{extension}").write_text(lines.get(extension, "1.png\n"))
    assert open_images(tmp_path / f"mine{extension}", key_prefix="shard").key(0) == "mine/1"


def test_files_of_one_name_and_several_extensions_have_keys_of_their_own(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "a.png.jpg", "a.png.jpg.png", "b.png", "b.png.jpg"]
    expected = [*names[:4], "b", "b.png"]
    folder = write(tmp_path / "images", *names)
    with ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    (tmp_path / "list.txt").write_text("\n".join(f"images/{name}" for name in names))
    for images in map(open_images, (folder, tmp_path / "images.zip")):
        assert [image.key for image in images] == expected
        assert images.duplicate_keys == (0, "")
    assert [image.key for image in open_images(tmp_path / "list.txt")] == [f"images/{key}" for key in expected]
    (folder / "labels.csv").write_text("key,label\na.png,0\na.png.jpg,1\nb.png,2\n")
    assert open_images(folder).labels.tolist() == [NO_LABEL, 0, 1, NO_LABEL, 2, NO_LABEL]


def test_class_names_beside_class_numbers_are_a_reason(tmp_path: Path, pack: Pack) -> None:
    (tmp_path / "s.tar").write_bytes(pack({"t.png": b"t", "t.cls": b"0"}))
    images = open_images([write(tmp_path / "pets", "cat/1.png"), tmp_path / "s.tar"])
    assert images.unlabeled == "pets has class names, s.tar class numbers"


def test_names_with_control_characters_are_escaped_in_messages(tmp_path: Path) -> None:
    images = open_images([write(tmp_path / "p", "cat/1.png", "a\x1b[31mb\nc.png")])
    (line,) = images.remarks
    assert line.startswith(r"unlabeled: p/a\x1b[31mb\nc.png lies beside")
    with pytest.raises(DataError) as caught:
        open_images([tmp_path / "no\x1b[31m\udcff"])
    assert r"no\x1b[31m\xff" in str(caught.value)


def test_links_to_folders_are_followed_without_cycles(tmp_path: Path) -> None:
    real = write(tmp_path / "real", "a.png")
    write(tmp_path / "data", "x/b.png")
    (tmp_path / "data" / "y").symlink_to(real)
    (tmp_path / "data" / "x" / "up").symlink_to(tmp_path / "data")
    assert {"x/b", "y/a"} <= set(keys(tmp_path / "data"))


def test_classes_of_several_sources_are_numbered_together(tmp_path: Path, pack: Pack) -> None:
    first = write(tmp_path / "one", "cat/1.png", "dog/2.png")
    second = write(tmp_path / "two", "bird/3.png", "dog/4.png")
    images = open_images([first, second])
    assert images.class_names == ("bird", "cat", "dog")
    assert [images.label(i) for i in range(4)] == [1, 2, 0, 2]
    (tmp_path / "s.tar").write_bytes(pack({"t.png": b"t", "t.cls": b"0"}))
    (tmp_path / "more.tar").write_bytes(pack({"u.png": b"u", "u.cls": b"4"}))
    assert open_images([tmp_path / "s.tar", tmp_path / "more.tar"]).num_classes == 5
    mixed = open_images([first, tmp_path / "s.tar", "builtin:photos/heldout"])
    assert [mixed.label(i) for i in range(3)] == [None] * 3
    assert mixed.num_classes is None


def test_globs_and_brace_patterns(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"s-{number:06d}.tar").write_bytes(pack({f"k{number}.png": b"x"}))
    (tmp_path / "odd{1,2}*.tar").write_bytes(pack({"odd.png": b"x"}))
    all_keys = [f"k{number}" for number in range(12)]
    assert keys(tmp_path / "s-*.tar") == all_keys
    assert open_images(tmp_path / "s-*.tar").name == "s-*.tar"
    assert open_images(tmp_path / "*-0*.tar").name == f"{tmp_path.name}/*-0*.tar"
    assert keys(f"{tmp_path}/s-{{000000..000011}}.tar") == all_keys
    assert keys(f"{tmp_path}/s-0000{{11,00}}.tar") == ["k11", "k0"]  # braces keep their order
    assert keys(f"{tmp_path}/s-{{000011,0*}}.tar")[0] == "k11"
    assert len(keys(f"{tmp_path}/s-{{000011,0*}}.tar")) == len(keys(f"{tmp_path}/s-0*.tar"))  # no file twice
    assert keys(f"file://{tmp_path}/s-000003.tar") == ["k3"]
    (tmp_path / "a b.tar").write_bytes(pack({"spaced.png": b"x"}))
    assert keys(f"file://localhost{tmp_path}/a%20b.tar") == ["spaced"]
    assert keys(tmp_path / "odd{1,2}*.tar") == ["odd"]  # an existing path is used as it is
    monkeypatch.chdir(tmp_path)
    assert keys("s-000001.tar") == ["k1"]
    with pytest.raises(DataError, match=r"no such images: s-000012\.tar, s-000013\.tar"):
        open_images("s-{000010..000013}.tar")


def test_fsspec_urls_are_opened(pack: Pack) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/bucket/s-{number}.tar", pack({f"k{number}.png": bytes([number]) * 900, f"k{number}.cls": b"5"}))
    for spec in ("memory://bucket/s-{0..1}.tar", "memory://bucket/s-*.tar"):
        images = open_images([spec])
        assert [(s.key, s.image, s.label) for s in images] == [
            ("k0", b"\0" * 900, 5),
            ("k1", b"\1" * 900, 5),
        ]
    with pytest.raises(DataError, match="cannot open memory://bucket/none"):
        open_images("memory://bucket/none.tar")
    with pytest.raises(DataError, match="no file system for gopher"):
        open_images("gopher://bucket/s.tar")


def test_shell_pipes_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would run a shell command"):
        open_images(f"pipe:touch {tmp_path}/ran; cat x.tar")
    with pytest.raises(DataError, match="would run a shell command"):
        open_images(f"pipe://touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_dataset_artifacts_are_opened(tmp_path: Path, pack: Pack) -> None:
    def publish(kind: str) -> Path:
        with artifacts.start(tmp_path / kind, kind, {}, {}) as draft:
            with draft.write("shard-000000.tar") as path:
                path.write_bytes(pack({"a.png": b"1", "a.cls": b"2"}))
            with draft.write("samples.parquet") as path:
                path.write_bytes(b"")
            return draft.publish({"num_classes": 10}).path

    images = open_images([publish("dataset")])
    assert (len(images), images.num_classes, images.label(0)) == (1, 10, 2)
    assert images.digest == open_images([tmp_path / "dataset" / "shard-000000.tar"]).digest
    with pytest.raises(ArtifactError, match="is a features artifact, not images"):
        open_images([publish("features")])
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(ArtifactError, match="not finished"):
        open_images([tmp_path / "begun"])
    write(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "manifest.json").write_text("{}")  # not an artifact's
    assert keys(tmp_path / "photos") == ["a"]


def test_artifact_of_reconstruct_names_its_folders(tmp_path: Path) -> None:
    with artifacts.start(tmp_path / "out", "images", {}, {}) as draft:
        for name in ("a.png", "originals/a.png", "reconstructions/a.png"):
            with draft.write(name) as path:
                path.write_bytes(b"1")
        draft.publish({})
    with pytest.raises(DataError, match=r"originals and their reconstructions\. Give .*out/originals or .*out/recon"):
        open_images(tmp_path / "out")
    assert keys(tmp_path / "out" / "originals") == ["a"]


def test_names_without_images_are_an_error(tmp_path: Path, pack: Pack) -> None:
    (tmp_path / "empty.tar").write_bytes(pack({}))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "s.tar").write_bytes(pack({"a.png": b"1"}))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.JPG").write_bytes(b"1")
    for specs, message in (
        ([], "no images were given"),
        ("", r"the name of the images is empty\. Name them, or write \. for the current folder"),
        ([tmp_path / "empty.tar"], "no images in empty.tar"),
        ([tmp_path / "tars"], r"holds no images. Give its tars: '.*\*\.tar'"),
        ([tmp_path / "absent"], "no such images: .*absent. Give a folder"),
        ([tmp_path / "pictur*.jpg"], r"no such images: .*pictur\*\.jpg\. Give a folder"),
        ([tmp_path / "picture"], r"no such images: .*picture\. Did you mean .*pictures\?"),
        (["https://example.org/a.jpg?token=1"], r"a\.jpg is one image\. Download it, or pack images into tars"),
        ([tmp_path / "ta*"], r"ta\* names folders, as .*tars\. Give each its own --images, or --images .*, whose"),
        (["builtin:cats"], "there is no builtin:cats. Use builtin:photos, builtin:photos/train"),
    ):
        with pytest.raises(DataError, match=message):
            open_images(specs)
    assert len(open_images([tmp_path / "empty.tar", tmp_path / "tars" / "s.tar"])) == 1


def test_images_are_image_files_and_patterns_of_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", "a/1.png", "a/2.JPG", "b/3.png")
    assert keys(folder / "a" / "1.png") == ["1"]
    assert keys(folder / "a" / "*") == ["1", "2"]
    found = open_images(str(folder / "*" / "*.png"))
    assert [found[row].key for row in range(len(found))] == ["a/1", "b/3"]
    assert found.num_classes is None
    (folder / "a" / "notes.txt").write_text("1.png")
    with pytest.raises(DataError, match="names files of several kinds"):
        open_images(str(folder / "a" / "*"))


def test_the_digest_depends_on_content_and_order_not_on_the_path(tmp_path: Path, pack: Pack) -> None:
    one = write(tmp_path / "one", "a/1.png", "b/2.png")
    same = write(tmp_path / "same", "a/1.png", "b/2.png")
    digest = open_images([one]).digest
    assert open_images([same]).digest == digest
    (same / "b" / "2.png").write_bytes(b"b/2.pnG")
    assert open_images([same]).digest != digest
    os.rename(one / "b", one / "c")
    assert open_images([one]).digest != digest
    for name in "xy":
        (tmp_path / f"{name}.tar").write_bytes(pack({f"{name}.png": b"1"}))
    assert (
        open_images([tmp_path / "x.tar", tmp_path / "y.tar"]).digest
        != open_images(str(tmp_path / "[yx].tar")[:-8] + "{y,x}.tar").digest
    )


def test_the_cached_digest_of_a_folder_is_used_only_while_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "photos", "1.png", "2.png")
    hashed: list[int] = []
    real = Folder.hash_file
    monkeypatch.setattr(Folder, "hash_file", lambda self, i: (hashed.append(i), real(self, i))[1])

    def digest(classes: str, second: bytes, seconds: int) -> str:
        (root / "labels.csv").write_text("key,label\n1,0\n2,1\n")
        (root / "classes.txt").write_text(classes)
        (root / "2.png").write_bytes(second)
        for name in ("1.png", "2.png"):
            os.utime(root / name, (seconds, seconds))
        return open_images([root]).digest

    changes = [("cat\ndog\n", b"2", 10**9), ("cat\nwolf\n", b"2", 10**9), ("cat\nwolf\n", b"3", 10**9 + 1)]
    digests = [digest(*change) for change in changes]
    assert len(set(digests)) == 3
    assert len(hashed) == 6
    assert digest(*changes[-1]) == digests[-1]
    assert len(hashed) == 6


def test_image_sets_pickle_small_and_read_after_unpickling(tmp_path: Path, pack: Pack) -> None:
    (tmp_path / "s.tar").write_bytes(pack({f"key-{i:06d}.png": b"%d" % i for i in range(2000)}))
    images = open_images([tmp_path / "s.tar", write(tmp_path / "flat", "é.png")])
    pickled = pickle.dumps(images)
    assert len(pickled) < 60 * len(images)
    again = pickle.loads(pickled)
    assert (again[1234].image, again[2000].key, again.digest) == (b"1234", "é", images.digest)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    images = open_images([tmp_path])
    assert (images.key(0), images.read(0)) == (r"caf\xe9", b"x")
    assert len(images.digest) == 64


def test_labels_are_known_without_reading_images(tmp_path: Path) -> None:
    images = open_images([write(tmp_path, "a/1.png", "b/2.png")])
    (tmp_path / "a" / "1.png").unlink()
    assert (images.key(0), images.label(0)) == ("a/1", 0)
    assert np.array_equal(images.labels, [0, 1])
    with pytest.raises(DataError, match=r"cannot read .*1\.png"):
        images.read(0)


def test_the_first_images_of_a_set_are_a_set(tmp_path: Path) -> None:
    write(tmp_path / "one", "n1/a.png", "n2/b.png")
    write(tmp_path / "two", "n1/a.png", "n3/c.png", "n3/d.png")
    images = open_images([tmp_path / "one", tmp_path / "two"])
    first = SelectedImages(images, range(3))
    assert list(first) == list(images)[:3]
    assert (len(first), first.labels.tolist(), first.num_classes) == (3, [0, 1, 0], images.num_classes)
    assert first.sets == [range(2), range(2, 3)]
    assert first.duplicate_keys[0] == images.duplicate_keys[0] == 1
    assert SelectedImages(images, range(2)).duplicate_keys == (0, "")
    assert SelectedImages(images, range(1)).sets == [range(1), range(1, 1)]
    assert len({images.digest, first.digest, SelectedImages(images, range(2)).digest}) == 3
    with pytest.raises(IndexError):
        first[3]
    assert list(pickle.loads(pickle.dumps(first))) == list(first)


def test_selected_images_have_their_own_digest_and_duplicate_keys(tmp_path: Path) -> None:
    write(tmp_path / "one", "a.png", "b.png", "c.png")
    write(tmp_path / "two", "c.png", "a.png", "e.png")
    images = open_images([tmp_path / "one", tmp_path / "two"])
    for order in ([1, 0, 2, 4], [5, 4, 2]):
        selected = SelectedImages(images, np.array(order))
        assert [sample.key for sample in selected] == [images.key(i) for i in order]
    few, other = SelectedImages(images, np.array([2, 4])), SelectedImages(images, np.array([2, 5]))
    assert few.duplicate_keys == (1, "c in one and two")
    assert few.remarks == ["duplicate keys: 1 key is that of several images, as c in one and two"]
    assert other.duplicate_keys == (0, "")
    assert few.sets == other.sets == [range(1), range(1, 2)]
    assert len({each.digest for each in (images, few, other)}) == 3
    assert list(SelectedImages(few, range(1))) == list(few)[:1]
