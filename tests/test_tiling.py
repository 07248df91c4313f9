"""Images of any size are reconstructed at that size, whole or in tiles."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.planning.tiles import tile_bytes
from vqpipe.quantizers.vq import VqConfig
from vqpipe.tiling import (
    check_norms,
    fixed_norms,
    mirrored,
    norm_statistics,
    ramp,
    reconstruct_any_size,
    spans,
)
from vqpipe.tokenizer import Tokenizer


class Identity:
    """A lossless autoencoder that records the sizes of its inputs."""

    downsample_factor = 8
    codebook_size: int | None = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def encode(self, images: Tensor) -> Tensor:
        self.seen.append((images.shape[2], images.shape[3]))
        assert images.shape[2] % 8 == images.shape[3] % 8 == 0
        return images

    def decode(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor:
        assert code.shape[2:] == image_size
        return code


class Numbered(Identity):
    """Decodes its k-th tile to a constant image proportional to k, with ids k."""

    codebook_size = 1024

    def encode(self, images: Tensor) -> Tensor:
        super().encode(images)
        return torch.full((1, images.shape[2] // 8 * images.shape[3] // 8), len(self.seen) - 1)

    def decode(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor:
        return torch.full((1, 3, *image_size), 20 * int(code[0, 0]), dtype=torch.uint8)

    def decode_float(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor:
        return torch.full((1, 3, *image_size), 0.125 * int(code[0, 0]) - 0.3)


def blended(tiles: list[tuple[int, int, int, int, int]], height: int, width: int, overlap: int) -> Tensor:
    """Blend tiles (top, bottom, left, right, value) in one sum of the size of the image."""
    total, weights = torch.zeros(height, width, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    for top, bottom, left, right, value in tiles:
        weight = torch.outer(ramp(bottom - top, overlap), ramp(right - left, overlap)).double()
        total[top:bottom, left:right] += value * weight
        weights[top:bottom, left:right] += weight
    return total / weights


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 121), (3, 200), (40, 16), (170, 131), (9, 9), (1, 1)])
def test_lossless_autoencoder_gives_the_image_back(height: int, width: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    lossless = Identity()
    result = reconstruct_any_size(lossless, image, tile=64, overlap=16)
    assert torch.equal(result.image, image)
    assert result.ids is None
    assert max(max(size) for size in lossless.seen) <= 64


@pytest.mark.parametrize(("height", "width"), [(160, 64), (168, 72), (72, 200)])
def test_tiles_are_blended_by_their_weights(height: int, width: int) -> None:
    numbered = Numbered()
    result = reconstruct_any_size(numbered, torch.zeros(3, height, width, dtype=torch.uint8), tile=64, overlap=16)
    places = [(a, b, c, d) for a, b in spans(height, 64, 16) for c, d in spans(width, 64, 16)]
    expected = blended([(*place, 20 * k) for k, place in enumerate(places)], height, width, 16)
    assert (result.image - expected).abs().max() < 0.501
    assert result.ids is not None
    assert [ids.unique().tolist() for ids in result.ids] == [[k] for k in range(len(places))]
    assert all(len(ids) == 64 for ids in result.ids)


@pytest.mark.parametrize(("length", "factor"), [(13, 8), (16, 8), (5, 8), (3, 8), (1, 8), (8, 16), (9, 16)])
def test_padding_reflects_or_else_replicates(length: int, factor: int) -> None:
    padding = -length % factor
    line = torch.arange(length).float()[None, None]
    expected = F.pad(line, (0, padding), mode="reflect" if padding < length else "replicate")[0, 0]
    assert mirrored(length, factor).tolist() == expected.tolist()


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 16), (72, 64, 16), (520, 64, 16), (8, 64, 63)])
def test_tiles_cover_the_image_and_overlap(length: int, tile: int, overlap: int) -> None:
    intervals = list(spans(length, tile, overlap))
    assert intervals[0][0] == 0
    assert intervals[-1][1] == length
    for (_, stop), (start, _) in pairwise(intervals):
        assert stop - start >= overlap
    assert all(stop - start == min(tile, length) for start, stop in intervals)


def test_blend_weights_are_linear() -> None:
    assert torch.allclose(ramp(8, overlap=3), torch.tensor([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]))


def test_tile_is_rounded_down_to_a_multiple_of_the_downsample_factor() -> None:
    numbered = Numbered()
    reconstruct_any_size(numbered, torch.zeros(3, 100, 30, dtype=torch.uint8), tile=63, overlap=0)
    assert set(numbered.seen) == {(56, 32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 7}, "tiles of 7 pixels are smaller than the downsample factor 8"),
        ({"tile": 64, "overlap": 64}, "an overlap of 64 pixels does not fit tiles of 64"),
        ({"tile": 64, "overlap": -1}, "an overlap of -1 pixels"),
    ],
)
def test_invalid_tiles_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reconstruct_any_size(Identity(), torch.zeros(3, 8, 8, dtype=torch.uint8), **options)


def test_unrounded_tiles_are_blended_in_floating_point() -> None:
    image = torch.zeros(3, 16, 40, dtype=torch.uint8)
    blended_image = reconstruct_any_size(Numbered(), image, tile=16, overlap=4, rounded=False).image
    tiles = [(0, 16, left, right, 0.125 * k - 0.3) for k, (left, right) in enumerate(spans(40, 16, 4))]
    assert blended_image.dtype == torch.float32
    torch.testing.assert_close(blended_image[0], blended(tiles, 16, 40, 4).float())  # type: ignore[arg-type]
    assert len(tiles) == 3


def random_tokenizer(**config: Any) -> Tokenizer:
    """A tokenizer with f = 4 and random weights, whose norms have random affine parameters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 8}
    quantizer = VqConfig(codebook_size=64, code_dim=4)
    model = build_autoencoder(VqganConfig(attention_resolutions=(), quantizer=quantizer, **(sizes | config)))
    for norm in model.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    return Tokenizer(model)


def half_dark(side: int) -> Tensor:
    """An image of noise that is dark on the left and bright on the right."""
    noise = torch.randint(0, 60, (3, side, side), dtype=torch.uint8)
    noise[:, :, side // 2 :] += 180
    return noise


def test_statistics_of_the_image_itself_give_its_own_reconstruction() -> None:
    tokenizer, image = random_tokenizer(), half_dark(32)
    code = tokenizer.encode(image[None])
    expected = tokenizer.decode_float(code, (32, 32))
    with fixed_norms(norm_statistics(tokenizer, image, tile=32)):
        assert torch.equal(tokenizer.encode(image[None]), code)
        torch.testing.assert_close(tokenizer.decode_float(code, (32, 32)), expected)
        other = tokenizer.decode_float(tokenizer.encode(255 - image[None]), (32, 32))
    assert torch.equal(tokenizer.decode_float(code, (32, 32)), expected)  # the norms are as before
    assert not torch.equal(tokenizer.decode_float(tokenizer.encode(255 - image[None]), (32, 32)), other)


class Normed(Identity):
    """Decodes pixels by convolutions between group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int | None] = []
        torch.manual_seed(0)
        conv, norm = torch.nn.Conv2d, torch.nn.GroupNorm
        self.autoencoder = torch.nn.Sequential(conv(3, 8, 1), norm(2, 8), torch.nn.SiLU(), conv(8, 8, 3), norm(2, 8))

    @torch.no_grad()
    def decode_float(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor:
        self.groups.append(groups)
        padded = F.pad(code.float() / 127.5 - 1, (1, 1, 1, 1), mode="replicate")
        return self.autoencoder(padded)[:, :3]


def test_shared_norms_bring_tiles_closer_to_the_untiled_reconstruction() -> None:
    autoencoder, image = Normed(), half_dark(96)
    whole = reconstruct_any_size(autoencoder, image, tile=96, overlap=0, rounded=False).image
    own, shared = (
        reconstruct_any_size(autoencoder, image, tile=32, overlap=8, rounded=False, shared_norms=shared).image
        for shared in (False, True)
    )
    errors = [float((tiled - whole).square().mean().sqrt()) for tiled in (own, shared)]
    assert errors[1] < 0.2 * errors[0]
    alone = reconstruct_any_size(autoencoder, image, tile=96, overlap=0, rounded=False, shared_norms=True).image
    assert torch.equal(alone, whole)


def test_statistics_are_of_the_shape_of_the_image_and_of_the_decoded_groups() -> None:
    autoencoder, image = Normed(), half_dark(96)[:, :32]
    reconstruct_any_size(autoencoder, image, groups=2, tile=32, overlap=0, rounded=False, shared_norms=True)
    assert autoencoder.seen == [(16, 48), (32, 32), (32, 32), (32, 32)]
    assert autoencoder.groups == [2, 2, 2, 2]


def test_statistics_of_a_long_narrow_image_are_those_of_its_own_size() -> None:
    autoencoder, image = Normed(), half_dark(96)[:, :8]
    norm_statistics(autoencoder, image, tile=32)
    assert autoencoder.seen == [(8, 96)]


def test_a_network_without_group_norms_cannot_share_them() -> None:
    class Plain(Identity):
        autoencoder = torch.nn.Conv2d(3, 3, 1)

    with pytest.raises(ConfigError, match="no group norms"):
        check_norms(Plain())


def test_the_memory_of_a_tile_grows_with_its_pixels() -> None:
    plain = random_tokenizer()
    small, large, wide = (tile_bytes(plain, *size) for size in ((64, 64), (128, 128), (62, 255)))
    assert small > 5 * 8 * 4 * 64 * 64  # five tensors of 8 channels at full resolution
    assert large == pytest.approx(4 * small, rel=0.1)
    assert wide == pytest.approx(large, rel=0.1)
