"""Numbers that other tools change silently: subsampled vectors, ids that overflow their type."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.data.tokens import check_token_ids, id_dtype, read_tokens, write_token_file
from vqpipe.errors import DataError

CPU = torch.device("cpu")


def test_kmeans_uses_every_vector() -> None:
    data = np.random.default_rng(0).standard_normal((1500, 2)).astype(np.float32)
    result = kmeans(FeatureSet([data], ["x"]), KmeansConfig(k=2, iterations=2), seed=0, device=CPU)
    assert int(result.counts.sum()) == 1500  # faiss samples 256 vectors per center by default


@pytest.mark.parametrize(
    ("codebook_size", "expected"),
    [(2, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (100_000, np.uint32)],
)
def test_ids_are_as_wide_as_the_codebook_needs(codebook_size: int, expected: type, tmp_path: Path) -> None:
    assert id_dtype(codebook_size) == expected
    highest = codebook_size - 1
    ids = torch.tensor([[[0]], [[highest]]])
    check_token_ids(ids, ["a", "b"], codebook_size)
    write_token_file(tmp_path / "t.parquet", ["a", "b"], [0, 0], ids.numpy().astype(id_dtype(codebook_size)))
    assert read_tokens(tmp_path / "t.parquet", codebook_size).ids.tolist() == [[0], [highest]]
    with pytest.raises(DataError, match=f"holds id {highest}, the codebook has {highest} codes"):
        read_tokens(tmp_path / "t.parquet", highest)
    for wrong in (codebook_size, -1):
        with pytest.raises(DataError, match="outside a codebook"):
            check_token_ids(torch.tensor([[[wrong]]]), ["a"], codebook_size)
