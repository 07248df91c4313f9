"""`vqbridge`: a small transformer over the whole codebook moves every code in each step, the quantizer of FVQ.

Chang et al. 2025, "Scalable Training for Vector-Quantized Networks with 100% Codebook Utilization" (arXiv 2509.10140).
Shapes: K codes as an image of H x W codes, C channels of a code, F of a stored code, P = (H / p) (W / p) patches.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig, Quantized, by_image, straight_through, to_rows
from vqpipe.quantizers.derived import DerivedCodebook
from vqpipe.search import nearest

WIDTH, HEADS, BLOCKS, MLP_RATIO = 256, 4, 2, 2
"""Of the bridge, as released."""


@dataclass(frozen=True, kw_only=True)
class VqBridgeConfig(CodebookConfig):
    """A codebook behind a bridge: learned from scratch, or frozen features of a codebook artifact."""

    kind: ClassVar[str] = "vqbridge"

    code_dim: int = 256
    """Channels of a code."""
    patch_size: int = 0
    """p, side of the patches of codes; 0: 4, and 8 from 65,536 codes on, as released, or the largest smaller side that
    divides the image of codes."""
    frozen_dim: int = 0
    """Channels of the codes of a frozen codebook artifact, which takes the place of the learned codes; 0: learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "l2" or self.normalize:
            raise ConfigError(
                "vqbridge compares squared distances: all its codes start at zero, which has no direction",
                "Leave out metric and normalize",
            )
        check_range(self, "model.quantizer", "[0, inf)", "patch_size", "frozen_dim")
        grid_of(self.codebook_size, self.side)

    @property
    def needs_codebook(self) -> bool:
        return self.frozen_dim > 0

    def codebook_settings(self, size: int, dim: int) -> dict[str, int]:
        return {"codebook_size": size, "frozen_dim": dim}

    @property
    def side(self) -> int:
        """p, the side of the patches in use."""
        if self.patch_size:
            return self.patch_size
        largest = 8 if self.codebook_size >= 65_536 else 4
        return next(side for side in range(largest, 0, -1) if find_grid(self.codebook_size, side))


class BridgedQuantizer(DerivedCodebook):
    """The codes are bridge(E), with E learned codes from U(-1/K, 1/K), seen as an image of H x W codes.

    The bridge: a convolution over patches of p x p codes, two transformer blocks over the patches, and a linear layer
    back to the codes, whose weights and bias are 0 at the start. There is no path around it and no position embedding:
    all codes start at 0, and a step that trains one code moves the codes at its place in all patches. The search is by
    squared distances, and the losses are those of `vq`; the authors weight "codebook" by 1 and "commitment" by 0.25.

    With `frozen_dim`, E is a frozen codebook of image features: the bridge in the place of `lc`'s linear projector.
    """

    config_class = VqBridgeConfig

    def __init__(self, config: VqBridgeConfig) -> None:
        super().__init__(config)
        size, width = config.codebook_size, config.frozen_dim or config.code_dim
        if config.frozen_dim:
            self.register_buffer("codes", torch.full((size, width), math.nan))
        else:
            self.codes = nn.Parameter(torch.empty(size, width).uniform_(-1 / size, 1 / size))
        self.bridge = Bridge(grid_of(size, config.side), config.side, width, config.code_dim)

    def forward(self, latent: Tensor) -> Quantized:
        """As of the base class; the bridge runs once, with gradient."""
        with torch.autocast(latent.device.type, enabled=False):
            latent = self.search_input(latent)
            codebook = self.codebook()
            ids = by_image(nearest(to_rows(latent), codebook, self.metric, check=not self.training), latent)
            codes = codebook[ids].transpose(1, 2).reshape_as(latent)
            return Quantized(straight_through(latent, codes), ids, self.losses(latent, codes))

    def derive(self) -> Tensor:
        return self.bridge(self.codes.float())

    def raw_embed(self, ids: Tensor) -> Tensor:
        return self.raw_codebook()[ids]

    def load_codebook(self, codebook: Tensor) -> None:
        if not self.config.needs_codebook:
            raise self.unsupported("learns its codes", "Set model.quantizer.frozen_dim, or leave --codebook out")
        super().load_codebook(codebook)


class Bridge(nn.Module):
    """float32[K, F] -> float32[K, C]; see `BridgedQuantizer`."""

    def __init__(self, grid: tuple[int, int], patch_size: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.grid, self.patch_size, self.out_dim = grid, patch_size, out_dim
        self.patches = nn.Conv2d(in_dim, WIDTH, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, patch_size * patch_size * out_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor) -> Tensor:
        (height, width), p = self.grid, self.patch_size
        image = codes.view(1, height, width, -1).permute(0, 3, 1, 2)
        patches = self.patches(image).flatten(2).transpose(1, 2)  # [1, P, WIDTH]
        moved = self.head(self.norm(self.blocks(patches)))
        moved = moved.view(height // p, width // p, p, p, self.out_dim).transpose(1, 2)
        return moved.reshape(height * width, self.out_dim)


class Block(nn.Module):
    """A pre-norm transformer block without dropout: attention with 4 heads, an MLP with tanh-GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, MLP_RATIO * WIDTH), nn.GELU("tanh"), nn.Linear(MLP_RATIO * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def find_grid(size: int, patch_size: int) -> tuple[int, int] | None:
    """(H, W) with H x W = `size`, both multiples of `patch_size`, H <= W, as square as possible; or None."""
    for height in range(math.isqrt(size), 0, -1):
        if size % height == 0 and height % patch_size == 0 and size // height % patch_size == 0:
            return height, size // height
    return None


def grid_of(size: int, patch_size: int) -> tuple[int, int]:
    """`find_grid`, or a ConfigError if there is none."""
    grid = find_grid(size, patch_size)
    if grid is None:
        raise ConfigError(
            f"{size} codes cannot be laid out in patches of {patch_size} x {patch_size}",
            "Set model.quantizer.patch_size or codebook_size",
        )
    return grid
