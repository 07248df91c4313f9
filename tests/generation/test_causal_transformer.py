"""The causal transformer: GPT-2's block against torch's encoder layer, rotary positions, caches."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vqpipe.generation import Gpt, GptConfig, Space
from vqpipe.generation.causal_transformer import (
    INIT_STD,
    Block,
    apply_rotary,
    empty_caches,
    gpt2_block,
    llama_block,
    rotary_2d,
)
from vqpipe.quantizers import TokenLayout

WIDTH, HEADS, LENGTH = 16, 4, 6


def as_torch_layer(block: Block) -> nn.TransformerEncoderLayer:
    """torch's own pre-norm layer with the weights of a GPT-2 block."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    pairs = {
        layer.self_attn.out_proj: block.attention.wo,
        layer.linear1: block.feed_forward.w1,
        layer.linear2: block.feed_forward.w2,
        layer.norm1: block.attention_norm,
        layer.norm2: block.ffn_norm,
    }
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.attention.wqkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attention.wqkv.bias)
    for target, source in pairs.items():
        target.load_state_dict(source.state_dict())
    return layer


def random_weights(block: Block) -> Block:
    torch.manual_seed(0)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    return block


def test_gpt2_block_equals_a_causal_pre_norm_encoder_layer() -> None:
    block = random_weights(gpt2_block(WIDTH, HEADS, dropout=0.0))
    vectors = torch.randn(3, LENGTH, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = as_torch_layer(block)(vectors, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(vectors), expected)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_cached_step_equals_the_whole_sequence(rotated: bool) -> None:
    make = llama_block if rotated else gpt2_block
    block = random_weights(make(WIDTH, HEADS, 0.0)).eval()
    rotary = rotary_2d(1, LENGTH - 1, WIDTH // HEADS) if rotated else None
    vectors = torch.randn(3, LENGTH, WIDTH)
    (cache,) = empty_caches(1, vectors[:, :1], HEADS, LENGTH)
    steps = [
        block(vectors[:, at : at + 1], None if rotary is None else rotary[at : at + 1], cache, at)
        for at in range(LENGTH)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(vectors, rotary))


def test_a_cache_has_the_type_of_keys_and_values_under_autocast() -> None:
    vector = torch.zeros(2, 1, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        caches = empty_caches(2, vector, HEADS, LENGTH)
    assert {cache.dtype for cache in caches} == {torch.bfloat16}
    assert empty_caches(1, vector, HEADS, LENGTH)[0].dtype == torch.float32


def test_dropout_acts_in_training_only() -> None:
    block = random_weights(gpt2_block(WIDTH, HEADS, dropout=0.5))
    vectors = torch.randn(1, LENGTH, WIDTH)
    assert not torch.equal(block(vectors), block(vectors))
    block.eval()
    assert torch.equal(block(vectors), block(vectors))


@pytest.mark.parametrize(("make", "dropped"), [(gpt2_block, True), (llama_block, False)])
def test_gpt2_drops_attention_weights_and_llama_does_not(make: Callable[..., Block], dropped: bool) -> None:
    attention, vectors = make(WIDTH, HEADS, 0.5).attention, torch.randn(1, LENGTH, WIDTH)
    attention.dropout = nn.Identity()
    assert torch.equal(attention(vectors), attention(vectors)) != dropped


def test_gpt_weights_are_initialised_as_gpt2_s() -> None:
    layout = TokenLayout(((4, 4),), 1)
    space = Space(layout=layout, codebook_size=50, latent_dim=4, code_dim=4, num_classes=3)
    torch.manual_seed(0)
    model = Gpt(GptConfig(layers=8, heads=2, width=64), space)
    residual = INIT_STD / math.sqrt(2 * 8)
    spread = {
        "layers.3.attention.wqkv.weight": INIT_STD,
        "layers.3.attention.wo.weight": residual,
        "layers.3.feed_forward.w1.weight": INIT_STD,
        "layers.3.feed_forward.w2.weight": residual,
        "tokens.weight": INIT_STD,
        "head.weight": INIT_STD,
        "positions": INIT_STD,
    }
    weights = dict(model.named_parameters())
    for name, expected in spread.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.15), name
    assert all(not weight.any() for name, weight in weights.items() if name.endswith(("wo.bias", "w2.bias")))


def test_rotary_attention_depends_on_differences_of_rows_and_columns() -> None:
    rotary = rotary_2d(4, 5, head_dim=8)
    assert rotary.shape == (21, 4, 2)
    assert rotary[0].eq(0).all()
    grid = rotary[1:].view(4, 5, 4, 2)
    assert torch.equal(grid[:, 0, :2], grid[:, 3, :2])  # the first half of the pairs: the row
    assert torch.equal(grid[0, :, 2:], grid[3, :, 2:])  # the second: the column
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def product(one: tuple[int, int], other: tuple[int, int]) -> Tensor:
        return (apply_rotary(query, grid[one].unsqueeze(0)) * apply_rotary(key, grid[other].unsqueeze(0))).sum()

    torch.testing.assert_close(product((0, 1), (2, 0)), product((1, 4), (3, 3)))
    assert not torch.isclose(product((0, 1), (2, 0)), product((0, 1), (1, 0)))
    torch.testing.assert_close(product((2, 2), (2, 2)), (query * key).sum())
