"""DiT: the published sizes, its embeddings and its patches."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation import Dit, DitConfig, Space, build_generator
from vqpipe.generation.dit import TimeEmbedding, position_embedding


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 33), ("B", 130), ("L", 458), ("XL", 675)],  # DiT, Table 4
)
def test_parameter_counts_are_the_paper_s(size: str, millions: int, make_space: Callable[..., Space]) -> None:
    with torch.device("meta"):
        generator = build_generator(DitConfig(size=size), make_space(32, 32, num_classes=1000))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert round(count / 1e6) == millions
    if size == "XL":
        # The released code counts the fixed positions as a parameter, and reports 675,129,632.
        assert count + 256 * 1152 == 675_129_632


def test_weights_have_the_released_names_and_shapes(make_space: Callable[..., Space]) -> None:
    with torch.device("meta"):
        space = make_space(16, 16, latent_dim=8, code_dim=8, num_classes=1000)
        network = build_generator(DitConfig(), space).network
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state["x_embedder.proj.weight"] == (1152, 8, 2, 2)
    assert state["final_layer.linear.weight"] == (2 * 2 * 16, 1152)
    assert state["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert state["pos_embed"] == (1, 64, 1152)
    assert state["blocks.27.adaLN_modulation.1.weight"] == (6 * 1152, 1152)
    assert state["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert state["t_embedder.mlp.0.weight"] == (1152, 256)


def test_positions_are_embedded_by_sines_and_cosines_of_column_and_row() -> None:
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


def test_patches_keep_their_places(make_space: Callable[..., Space]) -> None:
    """Blocks are identities at initialization: a patch of the output depends on the same patch of the input alone."""
    generator = build_generator(DitConfig(size="tiny", patch_size=2), make_space(4, 6))
    assert isinstance(generator, Dit)
    network = generator.network
    x = torch.zeros(1, 4, 4, 6)
    changed = x.clone()
    changed[:, :, 2, 5] = 1
    times, classes = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert not network(changed, times, classes).any()  # the output layer starts at 0

    nn.init.normal_(network.final_layer.linear.weight)
    differs = (network(changed, times, classes) - network(x, times, classes)).abs().amax(dim=(0, 1)) > 1e-6
    assert differs.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]

    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    differs = (network(changed, times, classes) - network(x, times, classes)).abs().amax(dim=(0, 1)) > 1e-6
    assert differs.all()
    assert network(x, times, classes).shape == (1, 8, 4, 6)


@torch.no_grad()
def test_the_forward_pass_is_that_of_the_released_code(make_space: Callable[..., Space]) -> None:
    torch.manual_seed(0)
    network = build_generator(DitConfig(size="tiny"), make_space(4, 6)).network
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, times, classes = torch.randn(2, 4, 4, 6), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    weights = network.state_dict()

    def linear(vectors: Tensor, name: str) -> Tensor:
        return F.linear(vectors, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(tokens, (128,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    proj = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    tokens = F.conv2d(x, *proj, stride=2).flatten(2).transpose(1, 2) + weights["pos_embed"]
    condition = F.silu(network.t_embedder(times) + weights["y_embedder.embedding_table.weight"][classes])
    for i in range(4):
        parts = linear(condition, f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
        qkv = linear(modulate(tokens, parts[0], parts[1]), f"blocks.{i}.attn.qkv")
        query, key, value = qkv.unflatten(2, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.mT / 32**0.5).softmax(-1) @ value
        tokens = tokens + parts[2][:, None] * linear(mixed.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = linear(modulate(tokens, parts[3], parts[4]), f"blocks.{i}.mlp.fc1")
        tokens = tokens + parts[5][:, None] * linear(F.gelu(hidden, approximate="tanh"), f"blocks.{i}.mlp.fc2")
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").chunk(2, 1)
    patches = linear(modulate(tokens, shift, scale), "final_layer.linear").reshape(2, 2, 3, 2, 2, 8)
    expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 8, 4, 6)
    torch.testing.assert_close(network(x, times, classes), expected)


def test_patches_that_do_not_divide_the_latent_are_refused(make_space: Callable[..., Space]) -> None:
    with pytest.raises(ConfigError, match="a latent of 4 x 6 is not divisible into patches of 4"):
        build_generator(DitConfig(size="tiny", patch_size=4), make_space(4, 6))
