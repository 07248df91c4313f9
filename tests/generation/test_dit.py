"""DiT: the published sizes, its embeddings, and what a sample depends on."""

import math

import pytest
import torch
from torch import nn

from vqpipe.errors import ConfigError
from vqpipe.generation.base import SamplingConfig, Space, build_generator
from vqpipe.generation.dit import Dit, DitConfig, TimeEmbedding, position_embedding
from vqpipe.quantizers import TokenLayout


def space(channels: int = 3, rows: int = 4, columns: int = 4, num_classes: int | None = 5) -> Space:
    return Space(
        layout=TokenLayout(((rows, columns),)),
        codebook_size=16,
        latent_dim=channels,
        code_dim=channels,
        num_classes=num_classes,
    )


def scrambled(generator: nn.Module) -> nn.Module:
    """Weights under which every input matters: freshly made, the output is 0."""
    torch.manual_seed(0)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    return generator


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 33), ("B", 130), ("L", 458), ("XL", 675)],  # DiT, Table 4
)
def test_sizes_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        generator = build_generator(DitConfig(size=size), space(4, 32, 32, 1000))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert round(count / 1e6) == millions
    if size == "XL":
        # The released code keeps the fixed positions as a parameter, and reports 675,129,632.
        assert count + 256 * 1152 == 675_129_632


def test_the_released_shape_with_eight_channels() -> None:
    with torch.device("meta"):
        network = build_generator(DitConfig(), space(8, 16, 16, 1000)).network
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state["x_embedder.proj.weight"] == (1152, 8, 2, 2)
    assert state["final_layer.linear.weight"] == (2 * 2 * 16, 1152)
    assert state["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert state["pos_embed"] == (1, 64, 1152)
    assert state["blocks.27.adaLN_modulation.1.weight"] == (6 * 1152, 1152)
    assert state["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert state["t_embedder.mlp.0.weight"] == (1152, 256)


def test_positions_are_those_of_the_paper() -> None:
    table = position_embedding(16, 3, 5).double()
    for row, column in ((0, 0), (2, 4), (1, 3)):
        for i in range(4):
            rate = 10_000 ** (-i / 4)
            expected = [f(p * rate) for p in (column, row) for f in (math.sin, math.cos)]
            assert table[row * 5 + column, i::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_times_are_embedded_by_cosines_and_sines() -> None:
    embedding = TimeEmbedding(256)
    embedding.mlp = nn.Sequential(nn.Identity())
    waves = embedding(torch.tensor([0.0, 7.0]))
    assert waves[0].tolist() == [1.0] * 128 + [0.0] * 128
    for i in (0, 1, 64, 127):
        angle = 7 * 10_000 ** (-i / 128)
        assert waves[1, [i, 128 + i]].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-5)


def test_patches_come_back_where_they_were() -> None:
    """With every block the identity, a patch of the output depends on its own patch of the input alone."""
    generator = build_generator(DitConfig(size="tiny", patch_size=2), space(3, 4, 6))
    assert isinstance(generator, Dit)
    network = generator.network
    nn.init.normal_(network.final_layer.linear.weight)
    x = torch.zeros(1, 3, 4, 6)
    changed = x.clone()
    changed[:, :, 2, 5] = 1
    times, classes = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    moved = (network(changed, times, classes) - network(x, times, classes)).abs().amax(dim=(0, 1)) > 1e-6
    assert moved.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]

    scrambled(network)
    moved = (network(changed, times, classes) - network(x, times, classes)).abs().amax(dim=(0, 1)) > 1e-6
    assert moved.all()
    assert network(x, times, classes).shape == (1, 6, 4, 6)


def test_it_starts_by_giving_zero_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    generator = build_generator(DitConfig(size="tiny"), space())
    examples, labels = torch.randn(4, 3, 4, 4), torch.arange(4)
    losses = generator(examples, labels)
    assert losses.keys() == {"total", "noise", "bound"}
    assert float(losses["noise"]) == pytest.approx(1, abs=0.3)
    losses = scrambled(generator)(examples, labels)
    losses["total"].backward()
    assert [name for name, value in generator.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_an_image_is_a_function_of_its_label_and_draw() -> None:
    generator = scrambled(build_generator(DitConfig(size="tiny"), space()))
    sampling = SamplingConfig(steps=3, cfg_scale=2.0)
    labels = torch.tensor([1, 2, 3])
    together = generator.sample(labels, sampling, draws(7, 8, 9))
    alone = generator.sample(labels[1:2], sampling, draws(8))
    assert together.shape == (3, 3, 4, 4)
    others = [
        generator.sample(torch.tensor([label]), SamplingConfig(steps=3, cfg_scale=scale), draws(seed))
        for label, seed, scale in ((3, 8, 2.0), (2, 9, 2.0), (2, 8, 1.0))
    ]
    apart = [float((together[1:2] - other).abs().max() / together.std()) for other in (alone, *others)]
    assert apart[0] < 1e-4
    assert min(apart[1:]) > 1e-2


def test_images_without_labels() -> None:
    generator = scrambled(build_generator(DitConfig(size="tiny"), space(num_classes=None)))
    labels = torch.tensor([-1, -1])
    assert float(generator.loss(torch.randn(2, 3, 4, 4), labels)["total"].detach()) > 0
    one, other = generator.sample(labels, SamplingConfig(steps=2), draws(1, 2))
    assert not torch.equal(one, other)
    with pytest.raises(ConfigError, match="cfg_scale = 2 needs a generator trained with class dropout"):
        generator.sample(labels, SamplingConfig(cfg_scale=2.0), draws(1, 2))


def test_refuses_patches_that_do_not_divide_the_latent() -> None:
    with pytest.raises(ConfigError, match="a latent of 4 x 6 does not divide into patches of 4"):
        build_generator(DitConfig(size="tiny", patch_size=4), space(3, 4, 6))


def test_its_weights_are_all_there_is_to_keep() -> None:
    """Built without memory and given the weights, it draws the same."""
    made = build_generator(DitConfig(size="tiny"), space())
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.device("meta"):
        again = build_generator(DitConfig(size="tiny"), space())
    again.load_state_dict(made.state_dict(), assign=True)
    labels, sampling = torch.tensor([3]), SamplingConfig(steps=2)
    assert torch.equal(again.sample(labels, sampling, draws(1)), made.sample(labels, sampling, draws(1)))


@pytest.mark.slow
def test_it_memorises_sixteen_latents() -> None:
    torch.manual_seed(0)
    examples, labels = torch.randn(16, 3, 4, 4), torch.arange(16)
    config = DitConfig(size="tiny", patch_size=1, class_dropout=0.0)
    generator = build_generator(config, space(num_classes=16))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    noise = []
    for _ in range(1000):
        losses = generator(examples.repeat(2, 1, 1, 1), labels.repeat(2))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        noise.append(float(losses["noise"]))
    assert sum(noise[-100:]) < 0.2 * sum(noise[:20]) * 5
    samples = generator.sample(labels, SamplingConfig(steps=100), draws(*range(16)))
    distances = torch.cdist(samples.flatten(1), examples.flatten(1)) / 48**0.5
    assert distances.argmin(dim=1).tolist() == labels.tolist()
    assert distances.diagonal().max() < 0.4  # two unlike latents are 1.4 apart
