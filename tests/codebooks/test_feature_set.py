"""Feature files read as one matrix, and files that are none."""

from pathlib import Path

import numpy as np
import pytest

from vqpipe.codebooks.feature_set import FeatureSet, open_features
from vqpipe.errors import ArtifactError, DataError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    data = np.arange(60, dtype=np.float16).reshape(20, 3)
    for name, part in (("b", data[:7]), ("a", data[7:])):
        np.save(tmp_path / f"{name}.npy", part)
    return [tmp_path / "b.npy", tmp_path / "a.npy"]


def test_rows_count_through_files_in_the_given_order(files: list[Path]) -> None:
    features = open_features(files)
    data = np.arange(60, dtype=np.float32).reshape(20, 3)
    assert (features.num_vectors, features.dim, features.labels) == (20, 3, None)
    for start, stop in ((0, 20), (5, 9), (0, 7), (7, 8)):
        assert np.array_equal(features.read(start, stop), data[start:stop])
    rows = np.array([19, 0, 7, 6, 0])
    assert np.array_equal(features.take(rows), data[rows])
    assert (features.place(6), features.place(7)) == ("b.npy, row 6", "a.npy, row 0")


def test_the_digest_is_of_content_and_order(files: list[Path], tmp_path: Path) -> None:
    digest = open_features(files).digest
    renamed = [path.rename(path.with_name(f"other-{path.name}")) for path in files]
    assert open_features(renamed).digest == digest
    assert open_features(renamed[::-1]).digest != digest


def test_rows_are_stored_in_half_precision_where_every_shard_is() -> None:
    parts = [np.arange(8, dtype=kind).reshape(4, 2) for kind in (np.float16, np.float16, np.float32, np.float64)]
    half, mixed = FeatureSet(parts[:2], ["a", "b"]), FeatureSet(parts, list("abcd"))
    assert (half.dtype, mixed.dtype) == (np.float16, np.float32)
    for features in (half, mixed):
        rows = features.stored(2, 7)
        assert rows.numpy().dtype == features.dtype
        assert np.array_equal(rows.float(), np.concatenate([parts[0][2:], parts[0][:3]]))
        assert features.read(7, 8).tolist() == [[6, 7]]
    assert np.shares_memory(half.stored(4, 6).numpy(), parts[1])
    assert not np.shares_memory(mixed.stored(4, 6).numpy(), parts[1])


def test_blocks_cover_all_rows_once() -> None:
    features = FeatureSet([np.zeros((70_000, 1), np.float16)], ["x"])
    assert [len(features.block(start)) for start in features.block_starts()] == [65_536, 4_464]


def test_refuses_what_is_no_matrix_of_floats(files: list[Path], tmp_path: Path) -> None:
    def save(array: np.ndarray) -> Path:
        np.save(tmp_path / "bad.npy", array)
        return tmp_path / "bad.npy"

    with pytest.raises(DataError, match=r"float32 of shape \[3\]"):
        open_features([save(np.zeros(3, np.float32))])
    with pytest.raises(DataError, match=r"int64 of shape \[3, 2\]"):
        open_features([save(np.zeros((3, 2), np.int64))])
    with pytest.raises(DataError, match="holds no vectors"):
        open_features([save(np.zeros((0, 2), np.float32))])
    with pytest.raises(DataError, match=r"bad.npy has dimension 5, b.npy has 3"):
        open_features([files[0], save(np.zeros((4, 5), np.float32))])
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        open_features([save(np.array([{}], dtype=object))])
    (tmp_path / "bad.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        open_features([tmp_path / "bad.npy"])
    whole = save(np.zeros((100, 3), np.float16)).read_bytes()
    (tmp_path / "bad.npy").write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"bad.npy is cut short: it ends after 678 bytes"):
        open_features([files[0], tmp_path / "bad.npy"])
    with pytest.raises(DataError, match="No such file"):
        open_features([tmp_path / "absent.npy"])
    with pytest.raises(ArtifactError, match="not a vqpipe artifact"):
        open_features([tmp_path])
    with pytest.raises(DataError, match="no features were named"):
        open_features([])
