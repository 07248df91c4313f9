"""`dit`: a transformer on patches of a noisy latent that predicts noise and log-variance.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers" (DiT), with the adaLN-Zero block; attention and MLP
are timm's, as in the released code, and modules have its names. DiT-XL/2 has the paper's 675 M parameters: times and
classes are embedded once for all blocks. (diffusers' DiTTransformer2DModel has embeddings in each block: 750 M, and
each block would drop classes independently in training.)

Differences from VQGAN-LC's released code: see `latents.py`, and `diffusion.py` for the variational bound.

Shapes: B images, C latent channels, h x w positions, p side of a patch, T = h w / p^2 tokens, D channels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation.base import GeneratorConfig, Space
from vqpipe.generation.diffusion import DiffusionConfig, DiffusionGenerator

FREQUENCIES = 256
"""Sines and cosines of the time embedding, before its MLP."""


SIZES = {"tiny": (4, 4, 128), "S": (12, 6, 384), "B": (12, 12, 768), "L": (24, 16, 1024), "XL": (28, 16, 1152)}
"""Size -> layers, heads and width: DiT, Table 1, and a size that trains on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(GeneratorConfig):
    """The transformer of DiT and SiT; defaults: XL/2."""

    size: Literal["tiny", "S", "B", "L", "XL"] = "XL"
    """Layers, heads and width; see `SIZES`."""
    patch_size: Literal[1, 2, 4, 8] = 2
    """p, side of a patch in positions; a patch is one token."""


@dataclass(frozen=True, kw_only=True)
class DitConfig(TransformerConfig, DiffusionConfig):
    """DiT: 1000 times, betas evenly spaced from 1e-4 to 0.02, learned variance; sampled by DDPM."""

    kind: ClassVar[str] = "dit"

    learn_variance: bool = True


class Dit(DiffusionGenerator):
    """DiT on a tokenizer's latents."""

    config_class = DitConfig
    network: "Transformer"

    def __init__(self, config: DitConfig, space: Space) -> None:
        super().__init__(config, space)
        self.network = Transformer(config, self.latent_shape, self.output_channels, self.num_class_embeddings)

    def blocks(self) -> Iterable[nn.Module]:
        return self.network.blocks


class Transformer(nn.Module):
    """(float[B, C, h, w], times float32[B], classes int64[B]) -> float[B, out_channels, h, w].

    Raises:
        ConfigError: `patch_size` does not divide the latent.
    """

    pos_embed: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        latent_shape: tuple[int, int, int],
        out_channels: int,
        num_class_embeddings: int,
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        layers, heads, dim = SIZES[config.size]
        patch = config.patch_size
        if height % patch or width % patch:
            raise ConfigError(
                f"a latent of {height} x {width} is not divisible into patches of {patch}",
                "Use another generator.patch_size",
            )
        self.patch_size, self.grid = patch, (height // patch, width // patch)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_class_embeddings, dim)})
        self.register_buffer("pos_embed", position_embedding(dim, *self.grid)[None])
        self.blocks = nn.ModuleList(DitBlock(dim, heads) for _ in range(layers))
        self.final_layer = FinalLayer(dim, patch * patch * out_channels)
        self.initialize()

    def initialize(self) -> None:
        """As DiT: Xavier for linear layers, N(0, 0.02) for embeddings; blocks start as identities, the output as 0."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
                if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                    nn.init.zeros_(layer.weight)
            elif isinstance(layer, nn.Conv2d):  # a linear layer on patches
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        for layer in (*self.t_embedder.modules(), *self.y_embedder.modules()):
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder(times) + self.y_embedder["embedding_table"](classes)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition).unflatten(2, (self.patch_size, self.patch_size, -1))
        grid = patches.unflatten(1, self.grid)  # [B, h/p, w/p, p, p, out]
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class DitBlock(nn.Module):
    """Attention and MLP, scaled, shifted and gated by the condition: float[B, T, D], float[B, D] -> float[B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        from timm.layers.activations import GELUTanh  # seconds
        from timm.layers.attention import Attention
        from timm.layers.mlp import Mlp

        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        tokens = tokens + gate * self.attn(self.norm1(tokens) * (1 + scale) + shift)
        return tokens + gate_mlp * self.mlp(self.norm2(tokens) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """float[B, T, D], float[B, D] -> float[B, T, p^2 out_channels]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


class TimeEmbedding(nn.Module):
    """Times float32[B] -> float[B, D]: sinusoids of 128 frequencies from 1 to about 1/10000, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=times.device))
        angles = times.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """Return fixed sinusoids, float32[rows * columns, width]; the first half of the channels is for columns (MAE)."""
    quarter = width // 4
    rates = 1 / 10_000 ** (np.arange(quarter) / quarter)
    row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1) * rates
    waves = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return torch.from_numpy(waves.astype(np.float32))
