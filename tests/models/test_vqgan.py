from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqpipe.errors import ConfigError
from vqpipe.models import PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.models.vqgan import Attention, Decoder, Encoder, ResidualBlock, group_norm
from vqpipe.quantizers import LcConfig, VqConfig

F16, F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)


def paper(multipliers: tuple[int, ...], code_dim: int = 8) -> VqganConfig:
    return VqganConfig(channel_multipliers=multipliers, quantizer=LcConfig(codebook_size=100_000, code_dim=code_dim))


def size_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "trainable", "tensors"),
    [
        (paper(F16), 29_298_176, 42_449_795, 72_421_844, 345),
        (paper(F8), 26_455_936, 38_260_227, 65_390_036, 251),
        (paper(F8, code_dim=4), 26_455_936, 38_260_227, 65_384_908, 251),
    ],
    ids=["f16", "f8", "f8-dim4"],
)
def test_number_of_parameters_is_as_published(
    config: VqganConfig, encoder: int, decoder: int, trainable: int, tensors: int
) -> None:
    with torch.device("meta"):
        model, discriminator = build_autoencoder(config), PatchDiscriminator()
    assert size_of(model.encoder) == encoder
    assert size_of(model.decoder) == decoder
    assert size_of(model) + size_of(discriminator) == trainable
    assert len(model.state_dict().keys() - {"quantizer.shift", "quantizer.scale"}) == tensors


def test_f8_has_attention_in_the_middle_only() -> None:
    with torch.device("meta"):
        f8, f16 = build_autoencoder(paper(F8)), build_autoencoder(paper(F16))
    assert [name for name, module in f8.named_modules() if isinstance(module, Attention)] == [
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
    ]
    levels = [name for name, module in f16.named_modules() if isinstance(module, Attention) and "mid" not in name]
    assert levels == [*(f"encoder.down.4.attn.{i}" for i in range(2)), *(f"decoder.up.4.attn.{i}" for i in range(3))]


def test_levels_with_attention_are_counted_in_positions_of_patches() -> None:
    config = VqganConfig(patch_size=4, channel_multipliers=(1, 1, 2), quantizer=VqConfig(codebook_size=4, code_dim=2))
    assert [config.attends(level) for level in range(3)] == [False, False, True]  # 64, 32 and 16 positions a side


@pytest.mark.parametrize(("multipliers", "patch_size", "factor"), [(F16, 1, 16), (F8, 1, 8), ((1, 2), 4, 8)])
def test_resolution_changes_by_the_downsample_factor(
    multipliers: tuple[int, ...], patch_size: int, factor: int
) -> None:
    quantizer = VqConfig(codebook_size=4, code_dim=2)
    config = VqganConfig(base_channels=8, channel_multipliers=multipliers, patch_size=patch_size, quantizer=quantizer)
    assert config.downsample_factor == factor
    with torch.device("meta"):
        z = Encoder(config)(torch.zeros(1, 3, 64, 32))
        assert z.shape == (1, 256, 64 // factor, 32 // factor)
        assert Decoder(config)(z).shape == (1, 3, 64, 32)


def test_attention_matches_the_formula() -> None:
    torch.manual_seed(0)
    attention, x = Attention(32), torch.randn(2, 32, 3, 5)
    q, k, v = (conv(attention.norm(x)).flatten(2) for conv in (attention.q, attention.k, attention.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 32**-0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed))


def test_group_norm_of_narrow_networks() -> None:
    assert [group_norm(channels).num_groups for channels in (512, 128, 32, 48, 24, 8)] == [32, 32, 32, 16, 8, 8]


def test_invalid_sizes_are_rejected() -> None:
    with pytest.raises(ConfigError):
        VqganConfig(base_channels=0, quantizer=VqConfig(codebook_size=4, code_dim=2))


def test_in_place_activations_without_gradients_give_the_same_bits() -> None:
    torch.manual_seed(0)
    config = VqganConfig(
        quantizer=VqConfig(codebook_size=8, code_dim=4), base_channels=8, z_channels=4, attention_resolutions=(64,)
    )
    model, images = build_autoencoder(config), torch.randn(2, 3, 32, 32)
    kept = images.clone()
    with_gradients = model.decode(model.latent(images))
    with torch.no_grad():
        without = model.decode(model.latent(images))
    assert torch.equal(with_gradients, without)
    assert torch.equal(images, kept)
    block, latent = ResidualBlock(8, 8), torch.randn(1, 8, 4, 4)
    before = latent.clone()
    with torch.no_grad():
        block(latent)
    assert torch.equal(latent, before)  # a block must not change its input


def test_group_norm_is_that_of_torch_also_for_a_single_value() -> None:
    """One channel per group and one position, as of an image of one patch: torch.nn.GroupNorm is an error for a batch
    of one such image in evaluation too."""
    ours, theirs = group_norm(32).eval(), torch.nn.GroupNorm(32, 32, eps=1e-6).eval()
    for shape in ((1, 32, 3, 5), (2, 32, 1, 1)):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(x[:1])
    assert torch.equal(ours(x[:1]), ours(x)[:1])


class Sizes(TorchDispatchMode):
    """The largest number of elements of a result."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_attention_holds_no_matrix_of_all_pairs_of_positions(form: torch.memory_format) -> None:
    torch.manual_seed(0)
    attention, x = Attention(32), torch.randn(1, 32, 16, 16).to(memory_format=form).requires_grad_()
    with Sizes() as sizes:
        mixed = attention(x)
        mixed.sum().backward()
    assert sizes.largest < 256 * 256
    q, k, v = (conv(attention.norm(x)).flatten(2) for conv in (attention.q, attention.k, attention.v))
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(dim=2)  # of each query, over the keys
    expected = x + attention.proj_out((v @ weights.transpose(1, 2)).reshape_as(x))
    torch.testing.assert_close(mixed, expected)
