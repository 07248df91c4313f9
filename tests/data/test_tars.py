import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from vqpipe.data import sources, tars
from vqpipe.data.images import open_images
from vqpipe.data.sources import NO_LABEL
from vqpipe.data.tars import TarIndex, index_tar, tar_keys, write_tar
from vqpipe.errors import DataError

Pack = Callable[..., bytes]
MEMBERS = {"a.png": b"A" * 700, "a.cls": b"3", "b.png": b"B" * 512, "b.cls": b"14\n", "c.png": b"C" * 10}


def index(data: bytes, **options: str) -> TarIndex:
    return index_tar(io.BytesIO(data), "shard.tar", **options)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_finds_every_byte(pack: Pack, format: int) -> None:
    long = "d" * 90 + "/" + "é" * 60
    data = pack({**MEMBERS, f"{long}.png": b"L" * 99} if format != tarfile.USTAR_FORMAT else MEMBERS, format=format)
    found = index(data)
    assert found.keys == ["a", "b", "c"] + ([long] if format != tarfile.USTAR_FORMAT else [])
    assert found.labels[:3] == [3, 14, NO_LABEL]
    contents = [data[at : at + size] for at, size in zip(found.offsets, found.sizes, strict=True)]
    assert contents[:3] == [b"A" * 700, b"B" * 512, b"C" * 10]
    assert index(data, sha256="known").offsets == found.offsets  # without reading the images
    assert found.size == len(data)


def test_every_truncation_is_an_error(pack: Pack) -> None:
    data = pack(MEMBERS)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in range(0, end + 1024, 128):
        for options in ({}, {"sha256": "known"}):
            with pytest.raises(DataError, match=r"shard\.tar (is truncated|is empty)"):
                index(data[:cut], **options)
    assert index(data[: end + 1024]).keys == ["a", "b", "c"]  # the padding to 10,240 bytes is not required


def test_a_damaged_header_is_an_error(pack: Pack) -> None:
    data = bytearray(pack(MEMBERS))
    data[data.index(b"b.png")] ^= 1
    with pytest.raises(DataError, match="no tar header at byte 2560"):
        index(bytes(data))


def test_two_joined_tars_are_an_error(pack: Pack) -> None:
    with pytest.raises(DataError, match="has data after its end mark"):
        index(pack(MEMBERS) + pack({"z.png": b"Z"}))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"1", "b.png": b"2", "a.jpg": b"3"}, r"two images of the key 'a': a.png at byte 512, a.jpg at 2560"),
        ({"../evil.png": b"1"}, "outside its own folder"),
        ({"/etc/evil.png": b"1"}, "outside its own folder"),
        ({"a.x.png": b"1", "a.x.jpg": b"3"}, r"two images of the key 'a.x': a.x.png at byte 512, a.x.jpg at 1536"),
    ],
)
def test_invalid_members_are_an_error(pack: Pack, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        index(pack(members))


def test_other_members_are_counted_and_never_followed(pack: Pack) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("f.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("A.JPG", "b.seg.txt", "c.json", "d.cls", "._A.JPG", "folder/e.WebP"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    found = index(file.getvalue())
    assert found.keys == ["A", "folder/e"]
    assert found.ignored == {
        "dead link": 2,
        "device": 1,
        ".seg.txt": 1,
        ".json": 1,
        "hidden file": 1,
        "key without an image": 3,
    }


@pytest.mark.parametrize(("kind", "ignored"), [(b"D", {"device": 1}), (b"V", {"device": 1}), (b"M", {"device": 1})])
def test_data_of_members_of_rare_types_is_passed_over(kind: bytes, ignored: dict[str, int]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        rare, image = tarfile.TarInfo("folder"), tarfile.TarInfo("folder/a.png")
        rare.type, rare.size, image.size = kind, 600, 3
        file.write(rare.tobuf() + b"Ya.png\0".ljust(1024, b"\0"))
        tar.addfile(image, io.BytesIO(b"123"))
    data = file.getvalue()
    for options in ({}, {"sha256": "known"}):
        found = index(data, **options)
        assert (found.keys, found.offsets, found.ignored) == (["folder/a"], [2048], ignored)


def test_interleaved_members_of_a_key_form_a_sample(pack: Pack) -> None:
    found = index(pack({"a.png": b"1", "b.png": b"2", "a.cls": b"0", "b.cls": b"1"}))
    assert (found.keys, found.labels) == (["a", "b"], [0, 1])


def test_dots_before_the_image_extension_belong_to_the_key(pack: Pack) -> None:
    found = index(
        pack(
            {
                "p.jpg": b"1",
                "p.mask.png": b"2",  # another member of the sample p
                "p.cls": b"4",
                "img_8.Final.JPG": b"3",
                "dir.x/2024.01.05.png": b"4",
                "dir.x/2024.01.05.cls": b"5",
                "img_8.cls": b"6",
                "two.a.png": b"5",
                "two.b.png": b"6",
                "two.b.json": b'{"label": 8}',
                "two.cls": b"7",
            }
        )
    )
    assert found.keys == ["p", "img_8.Final", "dir.x/2024.01.05", "two.a", "two.b"]
    assert found.labels == [4, 6, 5, 7, 7]
    assert found.ignored == {".mask.png": 1, ".b.json": 1}


def test_a_file_of_a_rare_image_format_beside_the_image_is_left_out(pack: Pack) -> None:
    found = index(pack({"a.ppm": b"1", "a.jpg": b"22", "b.ppm": b"3"}))
    assert (found.keys, found.sizes, found.ignored) == (["a", "b"], [2, 1], {".ppm": 1})


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_read_as_the_members_that_they_point_to(format: int, tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "e" * 60
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, kind, target in (
            ("a/first.png", tarfile.SYMTYPE, f"../{long}.png"),  # a later member
            ("chain.png", tarfile.LNKTYPE, "a/first.png"),
            ("chain.cls", tarfile.LNKTYPE, "labels/three"),
            ("gone.png", tarfile.LNKTYPE, "a/none.png"),
            ("out.png", tarfile.SYMTYPE, "../../etc/passwd"),
            ("absolute.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("loop.png", tarfile.SYMTYPE, "loop.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name, data in ((f"./{long}.png", b"target"), ("labels/three", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "s.tar").write_bytes(file.getvalue())
    images = open_images([tmp_path / "s.tar"])
    assert [(image.key, image.image, image.label) for image in images] == [
        ("a/first", b"target", None),
        ("chain", b"target", 3),
        (long, b"target", None),
    ]
    assert images.left_out == {"dead link": 4, "file without an extension": 1, "key without an image": 1}


def test_labels_are_names_numbers_or_fields_of_json(pack: Pack, tmp_path: Path) -> None:
    def labels(*shards: dict[str, bytes]) -> tuple[list[int | None], tuple[str, ...], str]:
        for number, members in enumerate(shards):
            (tmp_path / f"{number}.tar").write_bytes(pack(members))
        images = open_images([f"{tmp_path}/{{0..{len(shards) - 1}}}.tar"] if len(shards) > 1 else tmp_path / "0.tar")
        return [images.label(i) for i in range(len(images))], images.class_names, images.unlabeled

    names = labels(
        {"a.png": b"", "a.cls": b"zebra\n", "b.png": b"", "b.cls": b"-1"},
        {"c.png": b"", "c.json": '{"text": "t", "class": "caf\u00e9"}'.encode()},
    )
    assert names == ([1, None, 0], ("caf\u00e9", "zebra"), "")
    assert labels(
        {"a.png": b"", "a.json": b'{"cls": 7.0}', "a.cls": b"2", "b.png": b"", "b.json": b'{"label": "3"}'}
    ) == (
        [2, 3],
        (),
        "",
    )
    unlabeled = {"a.png": b"", "a.json": b'{"text": "no label"}', "b.png": b"", "b.json": b"[1]"}
    assert labels(unlabeled) == ([None, None], (), "")
    assert open_images(tmp_path / "0.tar").left_out == {".json": 2}
    for members, message in (
        ({"b.png": b"", "b.cls": b"5"}, "a of 0.tar has the class name 'cat', b of 1.tar the class number 5"),
        ({"b.png": b"", "b.cls": b"\xff\xd8"}, r"1.tar: b.cls is not a class: b'\xff\xd8'"),
        ({"b.png": b"", "b.cls": b""}, "1.tar: b.cls is not a class: b''"),
        ({"b.png": b"", "b.cls": b"-2"}, "1.tar: b.cls is not a class: b'-2'"),
        ({"b.png": b"", "b.json": b'{"label": [1]}'}, "1.tar: b.json is not a class"),
    ):
        found = labels({"a.png": b"", "a.cls": b"cat"}, members)
        assert found[:2] == ([None, None], ())
        assert message in found[2]


def test_two_labels_of_a_key_cost_the_labels_only(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.png", "a.cls", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    images = open_images([tmp_path / "s.tar"])
    assert (images.label(0), images.unlabeled) == (None, "s.tar: two members a.cls")


def test_an_index_that_an_older_version_cached_is_not_used(pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(pack({"a.b.png": b"1"}))
    os.utime(path, (1e9, 1e9))
    status = path.stat()
    old = {"url": str(path), "size": status.st_size, "sha256": "0", "keys": [], "offsets": [], "sizes": []}
    sources.write_cache(f"tar {path} {status.st_size} {status.st_mtime_ns}", {**old, "labels": [], "ignored": {}})
    assert open_images([path]).key(0) == "a.b"


def test_the_cache_is_used_only_while_the_file_is_unchanged(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    real = tars.index_tar
    monkeypatch.setattr(tars, "index_tar", lambda file, name, *rest: (walked.append(name), real(file, name, *rest))[1])
    path = tmp_path / "s.tar"
    path.write_bytes(pack(MEMBERS))
    open_images([path])
    assert not list(tmp_path.glob("cache/vqpipe/index/*"))  # modified too recently to be cached
    os.utime(path, (1e9, 1e9))
    first = open_images([path])
    assert len(walked) == 2
    again = open_images([path])
    assert len(walked) == 2
    assert (again.digest, [again.key(i) for i in range(3)]) == (first.digest, ["a", "b", "c"])
    (cached,) = tmp_path.glob("cache/vqpipe/index/*")
    for damage in (b"", b"[]", cached.read_bytes()[:-9], cached.read_bytes().replace(b"512", b"513")):
        cached.write_bytes(damage)
        assert open_images([path]).digest == first.digest
    assert len(walked) == 6
    path.write_bytes(pack({"z.png": b"1"}))
    assert open_images([path]).key(0) == "z"


def test_open_shard_holds_its_index_in_buffers_and_equal_labels_once(pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(pack({f"{name}.{kind}": b"99999" for name in "ab" for kind in ("png", "cls")}))
    _, found = tars.open_index(str(path))
    assert isinstance(found.keys, pa.Array)
    assert isinstance(found.offsets, np.ndarray)
    assert found.labels == [99999, 99999]
    assert found.labels[0] is found.labels[1]


def test_no_cache_without_a_home_directory(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    (tmp_path / "s.tar").write_bytes(pack(MEMBERS))
    assert len(open_images([tmp_path / "s.tar"])) == 3


def test_a_shard_that_changes_during_a_job_is_an_error(pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(pack(MEMBERS))
    images = open_images([path])
    assert images.read(1) == b"B" * 512
    path.write_bytes(pack({**MEMBERS, "d.png": b"D"}))
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DataError, match="changed after it was indexed"):
        images.read(1)


def test_written_bytes_equal_those_of_webdataset(tmp_path: Path) -> None:
    """Tars published before TarWriter replaced webdataset's have the same bytes."""
    random = np.random.default_rng(0)
    keys = ["a", "a/b", "\u00fc", "k" * 99, "k" * 120, "folder/" * 40 + "x"]
    samples = [
        (f"{key}{i}", random.bytes(size), extension, label)
        for i, (key, size) in enumerate(zip(keys, (0, 1, 511, 512, 513, 20_000), strict=True))
        for extension, label in (("bmp", 7), ("png", None), ("jpg", 999))
    ]
    with write_tar(tmp_path / "ours.tar") as tar:
        for key, data, extension, label in samples:
            tar.write(f"{key}-{extension}", data, extension, label)
    theirs = webdataset.TarWriter(str(tmp_path / "theirs.tar"), user="vqpipe", group="vqpipe", mtime=0)
    for key, data, extension, label in samples:
        theirs.write({"__key__": f"{key}-{extension}", extension: data} | ({} if label is None else {"cls": label}))
    theirs.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_tar_keys_are_unique_and_without_dots() -> None:
    assert tar_keys(["a.b", "a_b", "x.y/c.d", "a.b"]) == ["a_b", "a_b_1", "x.y/c_d", "a_b_3"]
