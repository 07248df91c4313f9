from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import vqpipe
from vqpipe import Tokenizer, VqpipeError
from vqpipe.data.transforms import to_float, to_uint8
from vqpipe.errors import ArtifactError, DataError, NumericError, WeightsError
from vqpipe.quantizers import LcConfig, QuantizerConfig, TokenLayout
from vqpipe.tokenizer import check_negative, keep_groups


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: Callable[[QuantizerConfig], Tokenizer]) -> Tokenizer:
    return small_tokenizer(LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_public_names() -> None:
    assert vqpipe.__all__ == ["TokenLayout", "Tokenizer", "VqpipeError"]
    assert all(hasattr(vqpipe, name) for name in vqpipe.__all__)
    assert issubclass(DataError, VqpipeError)


def test_encode_and_decode(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (3, 8 * 6))
    assert tokenizer.layout(32, 24).num_tokens == 48
    assert (tokenizer.codebook_size, tokenizer.num_groups, tokenizer.downsample_factor) == (50, 1, 4)
    decoded = tokenizer.decode(ids, image_size=(32, 24))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, images.shape)
    assert torch.equal(tokenizer.encode(images.float() / 127.5 - 1), ids)


def test_decode_of_ids_equals_the_forward_pass_exactly(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    with torch.no_grad():
        reconstruction = tokenizer.autoencoder(to_float(images))
    decoded = tokenizer.decode(reconstruction.quantized.ids, (32, 24))
    assert torch.equal(decoded, to_uint8(reconstruction.images))


def test_ids_do_not_depend_on_the_batch(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), ids)


def test_empty_batch(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images[:0])
    assert (ids.dtype, ids.shape) == (torch.int64, (0, 48))
    decoded = tokenizer.decode(ids, (32, 24))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (0, 3, 32, 24))


def test_save_and_open_round_trip(tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    readers = tmp_path.stat().st_mode & 0o444
    assert (tmp_path / "model.safetensors").stat().st_mode & readers == readers
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    opened = Tokenizer.from_pretrained(tmp_path)
    assert opened.config == tokenizer.config
    assert opened.image_size == 32
    assert torch.equal(opened.encode(images), tokenizer.encode(images))


def test_invalid_images_are_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="is not divisible into cells of 4"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"float images in \[0, 255\]"):
        tokenizer.encode(torch.tensor([0.0, 255.0]).repeat(1, 3, 32, 16))
    with pytest.raises(DataError, match=r"dtype torch\.int32"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.int32))
    with pytest.raises(DataError, match="shape"):
        tokenizer.encode(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(NumericError):
        tokenizer.encode(torch.full((1, 3, 32, 32), float("nan")))


def test_invalid_ids_are_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="outside a codebook of 50"):
        tokenizer.decode(torch.full((1, 64), 50), (32, 32))
    with pytest.raises(DataError, match="ids of shape"):
        tokenizer.decode(torch.zeros(1, 63, dtype=torch.int64), (32, 32))
    with pytest.raises(DataError, match=r"ids of type torch\.float32"):
        tokenizer.decode(torch.zeros(1, 64), (32, 32))
    with pytest.raises(DataError, match="groups = 2, the tokenizer has 1"):
        tokenizer.decode(torch.zeros(1, 64, dtype=torch.int64), (32, 32), groups=2)


@pytest.mark.parametrize(
    ("ids", "fine"),
    [
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], True),
        ([[1, 2, -1, 4, 5, -1], [1, 2, 3, 4, 5, 6]], True),  # as nested masking leaves out groups, image by image
        ([[1, -1, -1, 4, -1, -1]], True),
        ([[-1, -1, -1, -1, -1, -1]], False),
        ([[1, -1, 3, 4, -1, 6]], False),
        ([[1, 2, -1, 4, 5, 6]], False),
        ([[1, 2, -2, 4, 5, -2]], False),
        ([[-1, 2, 3, -1, 5, 6]], False),
    ],
)
def test_negative_ids_are_those_of_groups_left_out_at_the_end(ids: list[list[int]], fine: bool) -> None:
    layout = TokenLayout(((1, 2),), num_groups=3)
    with nullcontext() if fine else pytest.raises(DataError, match="not those of whole groups left out"):
        check_negative(torch.tensor(ids), layout)


@pytest.mark.parametrize(
    ("ids", "fine"), [([[3, -1, -1]], True), ([[-1, 1, 1]], False), ([[3, 1, -1]], False), ([[3, 1, 1]], True)]
)
def test_negative_ids_may_be_the_last_scales(ids: list[list[int]], fine: bool) -> None:
    with nullcontext() if fine else pytest.raises(DataError, match="not those of whole groups left out"):
        check_negative(torch.tensor(ids), TokenLayout(((1, 1), (1, 2))))


def test_decoding_refuses_negative_ids(tokenizer: Tokenizer) -> None:
    for ids in (torch.full((1, 64), -1), torch.full((1, 64), -2), torch.tensor([[0] * 63 + [-1]])):
        with pytest.raises(DataError, match=r"ids of -[12], which are not"):
            tokenizer.decode(ids, (32, 32))


def test_keep_groups_masks_the_last_groups() -> None:
    layout = TokenLayout(((1, 2),), num_groups=3)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert keep_groups(ids, layout, 2).tolist() == [[1, 2, -1, 4, 5, -1]]


def test_repository_of_the_hub_is_opened_only_by_name(tokenizer: Tokenizer, tmp_path: Path, hub: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    hub.files["user/name"] = tmp_path
    with pytest.raises(ArtifactError, match="user/name is not a vqpipe artifact"):
        Tokenizer.from_pretrained(Path("user/name"))  # a mistyped --tokenizer
    assert hub.requests == []
    for source in ("user/name", "hf:user/name", Path("hf:user/name")):
        assert Tokenizer.from_pretrained(source).name == "name"
    assert hub.requests == ["user/name"] * 3


def test_invalid_folders_are_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is absent or is not the config of a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"codebook_size": 50', '"codebook_size": 51'))
    with pytest.raises(WeightsError, match="do not match their config"):
        Tokenizer.from_pretrained(tmp_path)
