"""LDM's UNet: the published sizes, and what its output depends on."""

import pytest
import torch
from torch import nn

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError
from vqpipe.generation.base import GeneratorConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.unet import LdmConfig
from vqpipe.quantizers import TokenLayout

TINY = LdmConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, class_channels=16)
F8 = LdmConfig(channel_multipliers=(1, 2, 4), num_res_blocks=2, attention_factors=(1, 2, 4))


def space(channels: int = 3, side: int = 4, num_classes: int | None = 5) -> Space:
    layout = TokenLayout(((side, side),))
    return Space(layout=layout, codebook_size=16, latent_dim=channels, code_dim=channels, num_classes=num_classes)


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_size_of_the_paper() -> None:
    """LDM-8 of Rombach et al. 2022, class-conditional: 395 M with its class embedding."""
    with torch.device("meta"):
        generator = build_generator(F8, space(4, 32, 1000))
    assert round(sum(parameter.numel() for parameter in generator.parameters()) / 1e6) == 395


def test_the_f16_of_vqgan_lc_attends_at_its_first_level_and_in_the_middle() -> None:
    with torch.device("meta"):
        generator = build_generator(LdmConfig(), space(8, 16, 1000))
    names = {name.split(".attentions")[0] for name, _ in generator.named_parameters() if ".attentions." in name}
    assert names == {"network.unet.down_blocks.0", "network.unet.mid_block", "network.unet.up_blocks.1"}
    unet = generator.network.unet
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 1024 // 32
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.in_features == 512
    assert len(list(generator.blocks())) == 3 + 3 + 4 + 4 + 2 + (3 + 4 + 1)
    assert generator.network.class_embedding.weight.shape == (1001, 512)


def test_it_starts_by_giving_zero_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    generator = build_generator(TINY, space())
    examples, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    assert not generator.network(examples, torch.tensor([3.0, 900.0]), labels).any()
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    losses = generator(examples, labels)
    assert losses.keys() == {"total", "noise"}
    losses["total"].backward()
    # One token to attend to has all of the attention, so queries, keys and what leads to them do not matter.
    idle = ("attn2.to_q", "attn2.to_k", "norm2")
    learnt = [(name, value.grad is not None and bool(value.grad.any())) for name, value in generator.named_parameters()]
    assert [name for name, learns in learnt if not learns and not any(part in name for part in idle)] == []


def test_an_image_is_a_function_of_its_label_and_draw() -> None:
    torch.manual_seed(0)
    generator = build_generator(TINY, space())
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    sampling = SamplingConfig(steps=3, cfg_scale=1.4)
    together = generator.sample(torch.tensor([1, 2]), sampling, draws(7, 8))
    alone = generator.sample(torch.tensor([2]), sampling, draws(8))
    others = [
        generator.sample(torch.tensor([label]), SamplingConfig(steps=3, cfg_scale=1.4, eta=eta), draws(seed))
        for label, seed, eta in ((3, 8, None), (2, 9, None), (2, 8, 0.0))
    ]
    apart = [float((together[1:] - other).abs().max() / together.std()) for other in (alone, *others)]
    assert apart[0] < 1e-4
    assert min(apart[1:]) > 1e-3


def test_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="a latent of 6 x 6 cannot be halved 2 times"):
        build_generator(F8, space(4, 6))
    for wrong, message in (
        ({"base_channels": 48}, "does not divide by 32 groups"),
        ({"attention_factors": [1, 4]}, "attention_factors names 4, and no level is that much smaller"),
        ({"channel_multipliers": []}, "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_table(GeneratorConfig, {"kind": "ldm", **wrong}, "generator")
    assert from_table(GeneratorConfig, to_table(F8), "generator") == F8


def test_its_weights_are_all_there_is_to_keep() -> None:
    """Built without memory and given the weights, it draws the same."""
    made = build_generator(TINY, space())
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.device("meta"):
        again = build_generator(TINY, space())
    again.load_state_dict(made.state_dict(), assign=True)
    labels, sampling = torch.tensor([3]), SamplingConfig(steps=2)
    assert torch.equal(again.sample(labels, sampling, draws(1)), made.sample(labels, sampling, draws(1)))


@pytest.mark.slow
def test_it_memorises_sixteen_latents() -> None:
    torch.manual_seed(0)
    examples, labels = torch.randn(16, 3, 4, 4), torch.arange(16)
    generator = build_generator(TINY, space(num_classes=16))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    noise = []
    for _ in range(1500):
        losses = generator(examples.repeat(2, 1, 1, 1), labels.repeat(2))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        noise.append(float(losses["noise"]))
    assert sum(noise[-100:]) < 0.2 * sum(noise[:20]) * 5
    samples = generator.sample(labels, SamplingConfig(steps=50), draws(*range(16)))
    distances = torch.cdist(samples.flatten(1), examples.flatten(1)) / 48**0.5
    assert distances.argmin(dim=1).tolist() == labels.tolist()
    assert distances.diagonal().max() < 0.4  # two unlike latents are 1.4 apart
