"""`ldm`: a UNet on a noisy latent, which predicts the noise and attends to the embedded class.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (LDM), with diffusers' UNet. The
defaults are VQGAN-LC's f16; f8: channel_multipliers (1, 2, 4), num_res_blocks 2, attention_factors (1, 2, 4).

The sizes are those of VQGAN-LC's released code, whose f16 has two levels (its paper says four) and lists attention at
factor 4, which no level of it reaches. Otherwise than there, the null class is trained (`class_dropout`): released, it
is sampled with though nothing ever trained it. `latents.py` says what else differs.

Shapes: B images, C latent channels, h x w positions, L levels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation.base import Space
from vqpipe.generation.diffusion import DiffusionConfig, DiffusionGenerator

GROUPS = 32
"""Groups of the UNet's group norms."""


@dataclass(frozen=True, kw_only=True)
class LdmConfig(DiffusionConfig):
    """LDM: 1000 times, the roots of the betas rising evenly; sampled by DDIM, as released with fresh noise (eta 1)."""

    kind: ClassVar[str] = "ldm"

    base_channels: int = 256
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 4)
    """Channels of each level in units of `base_channels`; each level but the last halves the sides."""
    num_res_blocks: int = 3
    """Residual blocks at a level on the way down; on the way up there is one more."""
    attention_factors: tuple[int, ...] = (1,)
    """Levels that attend, by how much smaller than the latent they are; the middle always does."""
    head_channels: int = 32
    """Channels of an attention head."""
    class_channels: int = 512
    """Channels of an embedded class."""
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    """Betas rise evenly, or their square roots do (LDM)."""
    beta_start: float = 0.0015
    """Variance added at the first time."""
    beta_end: float = 0.0195
    """Variance added at the last."""
    sampler: Literal["ddpm", "ddim"] = "ddim"
    """What the generator samples with."""
    eta: float = 1.0
    """ddim: share of fresh noise, 0 (deterministic) to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.base_channels, self.num_res_blocks, self.head_channels, self.class_channels)
        if not self.channel_multipliers or min(*sizes, *self.channel_multipliers) < 1:
            raise ConfigError("every size in [generator] must be at least 1", "See the preset ldm")
        if self.base_channels % GROUPS or self.base_channels % self.head_channels:
            raise ConfigError(
                f"generator.base_channels = {self.base_channels} does not divide by {GROUPS} groups and heads of "
                f"{self.head_channels} channels"
            )
        unknown = set(self.attention_factors) - {2**level for level in range(len(self.channel_multipliers))}
        if unknown:
            raise ConfigError(
                f"generator.attention_factors names {min(unknown)}, and no level is that much smaller",
                f"There are {len(self.channel_multipliers)} levels, of factors 1, 2, 4 and on",
            )


class Ldm(DiffusionGenerator):
    """LDM on a tokenizer's latents."""

    config_class = LdmConfig
    network: "Unet"

    def __init__(self, config: LdmConfig, space: Space) -> None:
        super().__init__(config, space)
        self.network = Unet(config, self.latent_shape, self.output_channels, self.class_rows)

    def blocks(self) -> Iterable[nn.Module]:
        """Every residual and every attention block of the UNet."""
        return [*self.network.residual_blocks(), *self.network.attention_blocks()]


class Unet(nn.Module):
    """(float[B, C, h, w], times float32[B], classes int64[B]) -> float[B, out_channels, h, w].

    Raises:
        ConfigError: a side of the latent does not halve at every level.
    """

    def __init__(
        self, config: LdmConfig, latent_shape: tuple[int, int, int], out_channels: int, class_rows: int
    ) -> None:
        from diffusers import UNet2DConditionModel  # seconds

        super().__init__()
        in_channels, height, width = latent_shape
        smallest = 2 ** (len(config.channel_multipliers) - 1)
        if height % smallest or width % smallest:
            raise ConfigError(
                f"a latent of {height} x {width} cannot be halved {len(config.channel_multipliers) - 1} times",
                "Use fewer generator.channel_multipliers",
            )
        channels = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        attends = [2**level in config.attention_factors for level in range(len(channels))]
        self.class_embedding = nn.Embedding(class_rows, config.class_channels)
        self.unet: Any = UNet2DConditionModel(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(channels),
            layers_per_block=config.num_res_blocks,
            down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            cross_attention_dim=config.class_channels,
            attention_head_dim=tuple(count // config.head_channels for count in channels),  # it means their number
            norm_num_groups=GROUPS,
        )
        self.initialize()

    def initialize(self) -> None:
        """As LDM's code: each block adds 0 at first, and the output is 0. (diffusers leaves PyTorch's own start.)"""
        last = [block.conv2 for block in self.residual_blocks()] + [block.proj_out for block in self.attention_blocks()]
        for layer in (*last, self.unet.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def residual_blocks(self) -> list[Any]:
        from diffusers.models.resnet import ResnetBlock2D

        return [part for part in self.unet.modules() if isinstance(part, ResnetBlock2D)]

    def attention_blocks(self) -> list[Any]:
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        return [part for part in self.unet.modules() if isinstance(part, Transformer2DModel)]

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        condition = self.class_embedding(classes)[:, None]
        return self.unet(x, times, encoder_hidden_states=condition, return_dict=False)[0]
