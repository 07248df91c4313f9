import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vqpipe.data import tars
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
        ({"a.png": b"1", "a.cls": b"cat"}, "not a class number: b'cat'"),
        ({"a.png": b"1", "a.cls": b"-1"}, "not a class number"),
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
        for name in ("A.JPG", "b.seg.png", "c.json", "d.cls", "._A.JPG", "folder/e.WebP"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    found = index(file.getvalue())
    assert found.keys == ["A", "folder/e"]
    assert found.ignored == {
        "link": 2,
        "device": 1,
        ".seg.png": 1,
        ".json": 1,
        "hidden": 1,
        "key without an image": 3,
    }


def test_interleaved_members_of_a_key_form_a_sample(pack: Pack) -> None:
    found = index(pack({"a.png": b"1", "b.png": b"2", "a.cls": b"0", "b.cls": b"1"}))
    assert (found.keys, found.labels) == (["a", "b"], [0, 1])


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
