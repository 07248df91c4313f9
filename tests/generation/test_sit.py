"""SiT: the path it learns, its size beside DiT's, and its samplers."""

import pytest
import torch
from torch import Tensor, nn

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, DataError
from vqpipe.generation.base import GeneratorConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.dit import DitConfig
from vqpipe.generation.sit import SitConfig
from vqpipe.quantizers import TokenLayout


def space(channels: int = 3, side: int = 4, num_classes: int | None = 5) -> Space:
    layout = TokenLayout(((side, side),))
    return Space(layout=layout, codebook_size=16, latent_dim=channels, code_dim=channels, num_classes=num_classes)


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_same_transformer_as_dit_without_the_variance() -> None:
    with torch.device("meta"):
        sit, dit = (build_generator(config(), space(8, 16, 1000)) for config in (SitConfig, DitConfig))
    shapes, others = ({name: value.shape for name, value in network.state_dict().items()} for network in (sit, dit))
    assert shapes.keys() == others.keys()
    different = {name for name in shapes if shapes[name] != others[name]}
    assert different == {"network.final_layer.linear.weight", "network.final_layer.linear.bias"}
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (sit, dit)]
    assert counts[1] - counts[0] == (1152 + 1) * 2 * 2 * 8


def test_the_loss_is_that_of_the_straight_path() -> None:
    """x_t moves from the data at t = 0 to the noise at t = 1; a network that knows the data has no error."""
    generator = build_generator(SitConfig(size="tiny"), space())
    examples = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    class Knowing(nn.Module):
        def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
            seen.append(times)
            return (x - examples) / times[:, None, None, None]  # (1 - t) x0 + t e - x0 = t (e - x0)

    generator.network = Knowing()
    torch.manual_seed(0)
    for _ in range(50):
        assert generator.loss(examples, torch.arange(8) % 5)["total"].item() < 1e-4
    times = torch.cat(seen)
    assert times.min() >= 0
    assert times.max() < 1
    assert float(times.mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_network_that_knows_one_latent_leads_there(sampler: str) -> None:
    generator = build_generator(SitConfig(size="tiny", sampler=sampler), space())  # type: ignore[arg-type]
    target = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator.network = Leading(target)
    samples = generator.sample(torch.tensor([0, 1]), SamplingConfig(steps=100), draws(1, 2))
    assert (samples - target).abs().max() < 0.15
    alone = generator.sample(torch.tensor([1]), SamplingConfig(steps=100), draws(2))
    assert torch.allclose(samples[1:], alone, atol=1e-5)


class Leading(nn.Module):
    """The velocity towards `target`, the same for all classes."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = nn.Parameter(target)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        return (x - self.target) / times.clamp(min=1e-2)[:, None, None, None]


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    generator = build_generator(SitConfig(size="tiny"), space())
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    losses = generator(torch.randn(4, 3, 4, 4), torch.arange(4))
    losses["total"].backward()
    assert [name for name, value in generator.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_refuses_what_it_cannot_do() -> None:
    generator = build_generator(SitConfig(size="tiny"), space())
    label = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="the sampler ddim needs predicted noise, sit predicts velocities"):
        generator.sample(label, SamplingConfig(sampler="ddim"), draws(1))
    with pytest.raises(DataError, match="the generator is for"):
        generator.loss(torch.zeros(1, 4, 4, 4), label)
    with pytest.raises(DataError, match="label 5 is out of range"):
        generator.sample(label + 5, SamplingConfig(), draws(1))
    config = from_table(GeneratorConfig, {"kind": "sit", "size": "B", "sampler": "sde"}, "generator")
    assert from_table(GeneratorConfig, to_table(config), "generator") == config


@pytest.mark.slow
def test_it_memorises_sixteen_latents() -> None:
    torch.manual_seed(0)
    examples, labels = torch.randn(16, 3, 4, 4), torch.arange(16)
    config = SitConfig(size="tiny", patch_size=1, class_dropout=0.1)
    generator = build_generator(config, space(num_classes=16))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    totals = []
    for _ in range(1000):
        total = generator(examples.repeat(2, 1, 1, 1), labels.repeat(2))["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert sum(totals[-100:]) < 0.2 * sum(totals[:20]) * 5
    for sampler in ("heun", "sde"):
        sampling = SamplingConfig(steps=100, sampler=sampler)  # type: ignore[arg-type]
        samples = generator.sample(labels, sampling, draws(*range(16)))
        distances = torch.cdist(samples.flatten(1), examples.flatten(1)) / 48**0.5
        assert distances.argmin(dim=1).tolist() == labels.tolist()
        assert distances.diagonal().max() < 0.4  # two unlike latents are 1.4 apart
