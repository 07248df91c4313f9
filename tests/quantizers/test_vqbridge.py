import math

import pytest
import torch

from vqpipe.errors import ConfigError
from vqpipe.quantizers import BridgedQuantizer, VqBridgeConfig, build_quantizer
from vqpipe.quantizers.vqbridge import grid_of

LATENT = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))


def make(**settings: int) -> BridgedQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(VqBridgeConfig(codebook_size=48, code_dim=6, patch_size=2, **settings))
    assert isinstance(quantizer, BridgedQuantizer)
    return quantizer


def test_all_codes_start_at_zero_and_a_step_moves_codes_of_every_patch() -> None:
    quantizer = make()
    assert not quantizer.codebook().any()
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        sum(quantizer(LATENT[:, :, :1, :1]).losses.values()).backward()
        optimizer.step()
    codes = quantizer.codebook().detach().view(6, 8, 6)
    first_of_each_patch = codes[::2, ::2].reshape(12, 6)
    assert (first_of_each_patch != 0).any(1).all()
    assert len(first_of_each_patch.unique(dim=0)) == 12


def test_codes_keep_their_place_in_the_image_of_codes() -> None:
    quantizer = make()
    with torch.no_grad():  # a bridge whose output is the number of the patch, in each of its codes
        quantizer.bridge.blocks = torch.nn.Identity()
        quantizer.bridge.norm = torch.nn.Identity()
        quantizer.bridge.patches.forward = lambda image: torch.arange(12.0).view(1, 1, 3, 4).expand(1, 256, 3, 4)
        quantizer.bridge.head.weight[:, 0] = 1.0
    codes = quantizer.codebook()[:, 0].view(6, 8)
    expected = torch.arange(12.0).view(3, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(codes, expected)


def block(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A transformer block of width 256 with 4 heads, written out for x, float[P, 256]."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()

    query, key, value = (block.qkv(norm(x))).chunk(3, dim=1)
    heads = [slice(64 * head, 64 * head + 64) for head in range(4)]
    scores = [query[:, head] @ key[:, head].T / 8 for head in heads]
    attended = [score.softmax(1) @ value[:, head] for score, head in zip(scores, heads, strict=True)]
    x = x + block.out(torch.cat(attended, dim=1))
    hidden = block.mlp[0](norm(x))
    hidden = hidden / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return x + block.mlp[2](hidden)


def test_bridge_equals_a_transformer_over_patches_written_out() -> None:
    bridge = make().bridge.double()
    torch.nn.init.normal_(bridge.head.weight)
    codes = torch.randn(48, 6, dtype=torch.float64)
    image = codes.view(6, 8, 6)
    corners = [(row, column) for row in range(0, 6, 2) for column in range(0, 8, 2)]
    patches = torch.stack([image[row : row + 2, column : column + 2] for row, column in corners])
    x = torch.einsum("pijc,wcij->pw", patches, bridge.patches.weight) + bridge.patches.bias
    for each in bridge.blocks:
        x = block(each, x)
    moved = bridge.head(torch.nn.functional.layer_norm(x, (256,), eps=1e-6)).view(12, 2, 2, 6)
    expected = torch.empty(6, 8, 6, dtype=torch.float64)
    for (row, column), patch in zip(corners, moved, strict=True):
        expected[row : row + 2, column : column + 2] = patch
    torch.testing.assert_close(bridge(codes), expected.view(48, 6))


@pytest.mark.parametrize("settings", [{"metric": "cosine"}, {"normalize": True}])
def test_directions_of_codes_that_start_at_zero_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="start at zero"):
        VqBridgeConfig(codebook_size=48, **settings)


def test_codes_are_computed_once_in_evaluation_and_again_after_a_change() -> None:
    quantizer = make().eval().requires_grad_(False)
    first = quantizer.raw_codebook()
    assert quantizer.raw_codebook() is first
    quantizer.bridge.head.bias.add_(1.0)
    assert not torch.equal(quantizer.raw_codebook(), first)


@pytest.mark.slow  # the tracer takes seconds
def test_evaluation_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    quantizer = make(frozen_dim=12).eval().requires_grad_(False)
    quantizer.load_codebook(torch.randn(48, 12))
    torch.nn.init.normal_(quantizer.bridge.head.weight)
    compiled = torch.compile(lambda latent: quantizer(latent).codes, fullgraph=True, backend="eager")
    assert torch.equal(compiled(LATENT), quantizer(LATENT).codes)


def test_frozen_features_take_the_place_of_the_learned_codes() -> None:
    quantizer = make(frozen_dim=12)
    with pytest.raises(ConfigError, match="no codebook yet"):
        quantizer(LATENT)
    features = torch.randn(48, 12)
    quantizer.load_codebook(features)
    sum(quantizer(LATENT).losses.values()).backward()
    assert torch.equal(quantizer.codes, features)
    assert "codes" not in dict(quantizer.named_parameters())
    with pytest.raises(ConfigError, match="expects 48 of 12"):
        quantizer.load_codebook(torch.zeros(40, 12))


def test_grid_is_as_square_as_the_patches_allow() -> None:
    assert grid_of(16_384, 4) == (128, 128)
    assert grid_of(100_000, 5) == (250, 400)
    sizes = {k: VqBridgeConfig(codebook_size=k).side for k in (1000, 1009, 16_384, 65_536, 100_000, 1_000_000)}
    assert sizes == {1000: 2, 1009: 1, 16_384: 4, 65_536: 8, 100_000: 5, 1_000_000: 8}
    with pytest.raises(ConfigError, match="patches of 4 x 4"):
        grid_of(100_001, 4)
