import numpy as np
import torch

from vqpipe.quantizers import LeechConfig, LeechQuantizer, build_quantizer
from vqpipe.quantizers.leech import golay_words, leech_vectors


def test_golay_words_have_the_weights_of_the_extended_code() -> None:
    words = golay_words()
    weights, counts = np.unique(words.sum(1), return_counts=True)
    assert dict(zip(weights.tolist(), counts.tolist(), strict=True)) == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}
    assert not (words[17] ^ words[1024] ^ words[17 ^ 1024]).any()  # linear


def test_vectors_are_the_three_shapes_of_the_shortest_vectors() -> None:
    vectors = leech_vectors().astype(np.int64)
    shapes = np.sort(np.abs(vectors), axis=1)[:, ::-1]
    counts = [int((shapes == shape).all(1).sum()) for shape in ([2] * 8 + [0] * 16, [3] + [1] * 23, [4] * 2 + [0] * 22)]
    assert counts == [97_152, 98_304, 1_104]
    assert (np.square(vectors).sum(1) == 32).all()
    assert len(np.unique(vectors, axis=0)) == 196_560


def test_inner_products_are_those_of_the_lattice() -> None:
    vectors = leech_vectors().astype(np.int32)
    some = np.random.default_rng(0).choice(len(vectors), 60, replace=False)
    products = vectors[some] @ vectors.T
    assert set(np.unique(products)) == {-32, -16, -8, 0, 8, 16, 32}
    # each vector has 4,600 neighbors at 60 degrees, and 47,104 at the angle of cosine 1/4
    assert ((products == 16).sum(1) == 4_600).all()
    assert ((products == 8).sum(1) == 47_104).all()


def test_search_finds_the_largest_inner_product() -> None:
    quantizer = build_quantizer(LeechConfig()).eval()
    assert isinstance(quantizer, LeechQuantizer)
    latent = torch.randn(1, 24, 2, 3, generator=torch.Generator().manual_seed(0))
    ids = quantizer(latent).ids.flatten()
    rows = latent.permute(0, 2, 3, 1).reshape(-1, 24)
    products = rows.double() @ torch.from_numpy(leech_vectors()).double().T
    torch.testing.assert_close(products.gather(1, ids[:, None])[:, 0], products.amax(1))


def test_codes_are_the_vectors_at_unit_length() -> None:
    (codes,) = build_quantizer(LeechConfig()).all_codes()
    torch.testing.assert_close(codes, torch.from_numpy(leech_vectors()).float() / 32**0.5)


def test_codes_are_not_saved_with_the_weights() -> None:
    assert not build_quantizer(LeechConfig()).state_dict()
