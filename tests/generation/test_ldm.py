"""LDM's UNet: the published sizes, where it attends, its initialization."""

from collections.abc import Callable

import pytest
import torch

from vqpipe.config import from_table
from vqpipe.errors import ConfigError
from vqpipe.generation import GeneratorConfig, LdmConfig, SamplingConfig, Space, build_generator

TINY = LdmConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, class_channels=16)
F8 = LdmConfig(channel_multipliers=(1, 2, 4), num_res_blocks=2, attention_factors=(1, 2, 4))


def test_the_parameter_count_is_the_paper_s(make_space: Callable[..., Space]) -> None:
    """LDM-8 of Rombach et al. 2022, class-conditional: 395 M with its class embedding."""
    with torch.device("meta"):
        generator = build_generator(F8, make_space(32, 32, num_classes=1000))
    assert round(sum(parameter.numel() for parameter in generator.parameters()) / 1e6) == 395


def test_vqgan_lc_s_f16_model_attends_at_its_first_level_and_in_the_middle(make_space: Callable[..., Space]) -> None:
    with torch.device("meta"):
        generator = build_generator(LdmConfig(), make_space(16, 16, latent_dim=8, code_dim=8, num_classes=1000))
    names = {name.split(".attentions")[0] for name, _ in generator.named_parameters() if ".attentions." in name}
    assert names == {"network.unet.down_blocks.0", "network.unet.mid_block", "network.unet.up_blocks.1"}
    unet = generator.network.unet
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 1024 // 32
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.in_features == 512
    assert len(list(generator.blocks())) == 3 + 3 + 4 + 4 + 2 + (3 + 4 + 1)
    assert generator.network.class_embedding.weight.shape == (1001, 512)


def test_the_output_and_the_branches_are_zero_at_initialization(make_space: Callable[..., Space]) -> None:
    generator = build_generator(TINY, make_space())
    assert not generator.network(torch.randn(2, 4, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([1, 2])).any()
    residual, attention = generator.network.residual_blocks(), generator.network.attention_blocks()
    assert not any(layer.weight.any() for layer in (*(b.conv2 for b in residual), *(b.proj_out for b in attention)))
    assert all(layer.weight.any() for layer in (*(b.conv1 for b in residual), *(b.proj_in for b in attention)))


def test_eta_sets_the_fresh_noise(make_space: Callable[..., Space], rngs: Callable[..., list[torch.Generator]]) -> None:
    torch.manual_seed(0)
    generator = build_generator(TINY, make_space())
    labels = torch.tensor([2])
    default, fresh, none = (
        generator.sample(labels, SamplingConfig(steps=3, eta=eta), rngs(8)) for eta in (None, 1.0, 0.0)
    )
    assert torch.equal(default, fresh)
    assert not torch.equal(default, none)


def test_invalid_sizes_are_refused(make_space: Callable[..., Space]) -> None:
    with pytest.raises(ConfigError, match="a latent of 6 x 6 cannot be halved 2 times"):
        build_generator(F8, make_space(6, 6))
    for wrong, message in (
        ({"base_channels": 48}, "is not divisible by 32 groups"),
        ({"attention_factors": [1, 4]}, "attention_factors: no level has the factor 4"),
        ({"channel_multipliers": []}, "names no level"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_table(GeneratorConfig, {"kind": "ldm", **wrong}, "generator")
