"""Damaged, empty and unusual tars."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from vqpipe.artifacts import Draft, start
from vqpipe.data.images import open_images
from vqpipe.data.tars import index_tar, tar_keys
from vqpipe.data.tokens import write_token_file
from vqpipe.errors import ArtifactError, DataError

Pack = Callable[..., bytes]
Png = Callable[[int], bytes]


def test_flipped_bit_in_an_image_changes_the_digest(tmp_path: Path, pack: Pack, png: Png) -> None:
    data = pack({f"{number}.png": png(number) for number in range(3)})
    rotten = bytearray(data)
    rotten[data.index(png(1)) + 20] ^= 1
    (tmp_path / "good.tar").write_bytes(data)
    (tmp_path / "bad.tar").write_bytes(rotten)
    good, bad = (open_images([tmp_path / name]) for name in ("good.tar", "bad.tar"))
    assert len(good) == len(bad) == 3  # only the hash shows it
    assert good.digest != bad.digest
    draft = start(tmp_path / "out", "dataset", {}, {"images": good})
    assert isinstance(draft, Draft)
    with draft:
        with draft.write("shard-000000.tar") as path:
            path.write_bytes(data)
        artifact = draft.publish({})
    (tmp_path / "out" / "shard-000000.tar").write_bytes(rotten)
    with pytest.raises(ArtifactError, match=r"shard-000000\.tar is damaged: sha256 \w{12}, published as \w{12}"):
        artifact.verify()
    with pytest.raises(ArtifactError, match=r"made with other images: good\.tar, not bad\.tar"):
        start(tmp_path / "out", "dataset", {}, {"images": bad})


@pytest.mark.parametrize("data", [b"", np.random.default_rng(0).bytes(4096), b"\0" * 512, b"<html>" * 200])
def test_bytes_that_are_not_a_tar_are_an_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"s\.tar (is empty|has no tar header|is truncated|is an HTML page)"):
        index_tar(io.BytesIO(data), "s.tar")


def test_empty_shard_among_others_has_no_samples(tmp_path: Path, pack: Pack, png: Png) -> None:
    (tmp_path / "0.tar").write_bytes(pack({}))
    (tmp_path / "1.tar").write_bytes(pack({"a.png": png(0)}))
    assert [sample.key for sample in open_images(f"{tmp_path}/*.tar")] == ["a"]


def test_same_key_in_two_shards_is_two_images(tmp_path: Path, pack: Pack, png: Png) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(pack({"a.png": png(number), "a.cls": b"%d" % number}))
    images = open_images(f"{tmp_path}/*.tar")
    assert [(sample.image, sample.label) for sample in images] == [(png(0), 0), (png(1), 1)]
    for keys in (["a", "a"], ["a_1", "a", "a"], ["a_2", "a", "a"], ["a.b", "a_b", "a_b_1", "a.b"]):
        written = tar_keys(keys)
        assert len(set(written)) == len(keys)


def test_missing_label_is_stored_as_missing(tmp_path: Path, pack: Pack, png: Png) -> None:
    (tmp_path / "s.tar").write_bytes(pack({"a.png": png(0), "b.png": png(1), "b.cls": b"0"}))
    images = open_images([tmp_path / "s.tar"])
    assert [sample.label for sample in images] == [None, 0]
    write_token_file(tmp_path / "t.parquet", ["a", "b"], images.labels.tolist(), np.zeros((2, 1, 1), np.uint16))
    assert parquet.read_table(tmp_path / "t.parquet")["label"].to_pylist() == [None, 0]


def sparse(pax: bool) -> bytes:
    """A tar with a sparse member as GNU tar writes it: marked in a pax header, or by its type."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        if pax:
            info.pax_headers = {"GNU.sparse.major": "1"}
        else:
            info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b" + b"x" * 600, "compressed with gzip. Unpack it first: `gunzip < s.tar > "),
        (b"BZh9" + b"x" * 600, "compressed with bzip2"),
        (b"\xfd7zXZ" + b"x" * 600, "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 600, "compressed with zstd"),
        (sparse(pax=True), "a.png is a sparse member. Pack the shard without --sparse"),
        (sparse(pax=False), "a.png is a sparse member"),
    ],
)
def test_compressed_and_sparse_shards_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError) as failure:
        index_tar(io.BytesIO(data), "s.tar")
    assert message in str(failure.value)
