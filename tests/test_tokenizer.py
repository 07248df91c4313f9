from pathlib import Path

import pytest
import torch

import vqpipe
from vqpipe import Tokenizer, VqpipeError
from vqpipe.errors import ArtifactError, DataError, NumericError, WeightsError
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import LcConfig, TokenLayout
from vqpipe.tokenizer import keep_groups


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    config = VqganConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        patch_size=2,
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
        quantizer=LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"),
    )
    autoencoder = build_autoencoder(config)
    autoencoder.whiten_init(torch.rand(16, 3, 32, 32) * 2 - 1)
    return Tokenizer(autoencoder, image_size=32)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_public_names_are_these_and_light() -> None:
    assert vqpipe.__all__ == ["TokenLayout", "Tokenizer", "VqpipeError"]
    assert all(hasattr(vqpipe, name) for name in vqpipe.__all__)
    assert issubclass(DataError, VqpipeError)


def test_images_to_ids_and_back(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (3, 8 * 6))
    assert tokenizer.layout(32, 24).num_tokens == 48
    assert (tokenizer.codebook_size, tokenizer.num_groups, tokenizer.downsample_factor) == (50, 1, 4)
    again = tokenizer.decode(ids, image_size=(32, 24))
    assert (again.dtype, again.shape) == (torch.uint8, images.shape)
    assert torch.equal(tokenizer.encode(images.float() / 127.5 - 1), ids)


def test_decoding_ids_is_the_whole_pass_bit_for_bit(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    from vqpipe.data.transforms import to_float, to_uint8

    with torch.no_grad():
        whole = tokenizer.autoencoder(to_float(images))
    assert torch.equal(tokenizer.decode(whole.quantized.ids, (32, 24)), to_uint8(whole.images))


def test_one_by_one_is_the_same_as_together(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    together = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), together)


def test_of_no_image_there_are_no_ids(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images[:0])
    assert (ids.dtype, ids.shape) == (torch.int64, (0, 48))
    again = tokenizer.decode(ids, (32, 24))
    assert (again.dtype, again.shape) == (torch.uint8, (0, 3, 32, 24))


def test_saved_and_opened_it_is_the_same(tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    readers = tmp_path.stat().st_mode & 0o444
    assert (tmp_path / "model.safetensors").stat().st_mode & readers == readers
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    opened = Tokenizer.from_pretrained(tmp_path)
    assert opened.config == tokenizer.config
    assert opened.image_size == 32
    assert torch.equal(opened.encode(images), tokenizer.encode(images))


def test_wrong_images_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="does not divide into cells of 4"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"float images in \[0, 255\]"):
        tokenizer.encode(torch.tensor([0.0, 255.0]).repeat(1, 3, 32, 16))
    with pytest.raises(DataError, match=r"dtype torch\.int32"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.int32))
    with pytest.raises(DataError, match="shape"):
        tokenizer.encode(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(NumericError):
        tokenizer.encode(torch.full((1, 3, 32, 32), float("nan")))


def test_wrong_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="outside a codebook of 50"):
        tokenizer.decode(torch.full((1, 64), 50), (32, 32))
    with pytest.raises(DataError, match="ids of shape"):
        tokenizer.decode(torch.zeros(1, 63, dtype=torch.int64), (32, 32))
    with pytest.raises(DataError, match=r"ids of type torch\.float32"):
        tokenizer.decode(torch.zeros(1, 64), (32, 32))
    with pytest.raises(DataError, match="groups = 2, the tokenizer has 1"):
        tokenizer.decode(torch.zeros(1, 64, dtype=torch.int64), (32, 32), groups=2)


def test_keeping_groups_masks_the_last_ones() -> None:
    layout = TokenLayout(((1, 2),), num_groups=3)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert keep_groups(ids, layout, 2).tolist() == [[1, 2, -1, 4, 5, -1]]


def test_a_folder_that_is_no_tokenizer_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is absent or is not a tokenizer's config"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"codebook_size": 50', '"codebook_size": 51'))
    with pytest.raises(WeightsError, match="do not fit their config"):
        Tokenizer.from_pretrained(tmp_path)
