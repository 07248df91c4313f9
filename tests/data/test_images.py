import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from vqpipe import artifacts
from vqpipe.data import sources
from vqpipe.data.images import Sample, open_images
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
    mixed = open_images([first, tmp_path / "s.tar", "builtin:photos/heldout"])
    assert [mixed.label(i) for i in range(3)] == [None] * 3
    assert mixed.num_classes is None


def test_globs_and_brace_patterns(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"s-{number:06d}.tar").write_bytes(pack({f"k{number}.png": b"x"}))
    (tmp_path / "odd{1,2}*.tar").write_bytes(pack({"odd.png": b"x"}))
    all_keys = [f"k{number}" for number in range(12)]
    assert keys(tmp_path / "s-*.tar") == all_keys
    assert keys(f"{tmp_path}/s-{{000000..000011}}.tar") == all_keys
    assert keys(f"{tmp_path}/s-0000{{11,00}}.tar") == ["k11", "k0"]  # braces keep their order
    assert keys(f"file://{tmp_path}/s-000003.tar") == ["k3"]
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


def test_names_without_images_are_an_error(tmp_path: Path, pack: Pack) -> None:
    (tmp_path / "empty.tar").write_bytes(pack({}))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "s.tar").write_bytes(pack({"a.png": b"1"}))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.JPG").write_bytes(b"1")
    for specs, message in (
        ([], "no images were given"),
        ([tmp_path / "empty.tar"], "no images in empty.tar"),
        ([tmp_path / "tars"], r"holds no images. Give its tars: '.*\*\.tar'"),
        ([tmp_path / "absent"], "no such images"),
        ([tmp_path / "pictures" / "*"], r"a\.JPG is one image. Name the folder that holds it: .*pictures"),
        (["builtin:cats"], "there is no builtin:cats. Use builtin:photos, builtin:photos/train"),
    ):
        with pytest.raises(DataError, match=message):
            open_images(specs)
    assert len(open_images([tmp_path / "empty.tar", tmp_path / "tars" / "s.tar"])) == 1


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
