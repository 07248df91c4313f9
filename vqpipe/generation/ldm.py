"""`ldm`: a UNet on a noisy latent that predicts noise and attends to the embedded class.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (LDM), with diffusers' UNet. The
defaults are VQGAN-LC's f16; f8: channel_multipliers (1, 2, 4), num_res_blocks 2, attention_factors (1, 2, 4).

The sizes are those of VQGAN-LC's released code, whose f16 model has two levels and lists attention at factor 4, which
none of its levels has. Its paper says four levels: the preset ldm-f16-paper. Unlike there, the null class is trained
(`class_dropout`); the released code samples with an untrained one. `latents.py` lists the other differences.

Shapes: B images, C latent channels, h x w positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.generation.base import Space
from vqpipe.generation.diffusion import DiffusionConfig, DiffusionGenerator

GROUPS = 32
"""Groups of the group norms."""


@dataclass(frozen=True, kw_only=True)
class LdmConfig(DiffusionConfig):
    """LDM: 1000 times, square roots of betas evenly spaced; sampled by DDIM, as released with fresh noise (eta 1)."""

    kind: ClassVar[str] = "ldm"

    base_channels: int = 256
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 4)
    """Channels of each level in units of `base_channels`; every level except the last halves the sides."""
    num_res_blocks: int = 3
    """Residual blocks per level of the down path; the up path has one more."""
    attention_factors: tuple[int, ...] = (1,)
    """Levels with attention, as downsampling factors of the latent; the middle block always has attention."""
    head_channels: int = 32
    """Channels of an attention head."""
    class_channels: int = 512
    """Channels of the class embedding."""
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    sampler: Literal["ddpm", "ddim"] = "ddim"
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("base_channels", "num_res_blocks", "head_channels", "class_channels")
        check_range(self, "generator", "[1, inf)", *sizes, "channel_multipliers")
        if not self.channel_multipliers:
            raise ConfigError("generator.channel_multipliers names no level", "See the preset ldm-f16")
        if self.base_channels % GROUPS or self.base_channels % self.head_channels:
            raise ConfigError(
                f"generator.base_channels = {self.base_channels} is not divisible by {GROUPS} groups and heads of "
                f"{self.head_channels} channels"
            )
        unknown = set(self.attention_factors) - {2**level for level in range(len(self.channel_multipliers))}
        if unknown:
            raise ConfigError(
                f"generator.attention_factors: no level has the factor {min(unknown)}",
                f"There are {len(self.channel_multipliers)} levels, with factors 1, 2, 4 and so on",
            )


class Ldm(DiffusionGenerator):
    """LDM on a tokenizer's latents."""

    config_class = LdmConfig
    network: "Unet"

    def __init__(self, config: LdmConfig, space: Space) -> None:
        super().__init__(config, space)
        self.network = Unet(config, self.latent_shape, self.output_channels, self.num_class_embeddings)

    def blocks(self) -> Iterable[nn.Module]:
        """Every residual and every attention block of the UNet."""
        return [*self.network.residual_blocks(), *self.network.attention_blocks()]


class Unet(nn.Module):
    """(float[B, C, h, w], times float32[B], classes int64[B]) -> float[B, out_channels, h, w].

    Raises:
        ConfigError: a side of the latent cannot be halved at every level.
    """

    def __init__(
        self, config: LdmConfig, latent_shape: tuple[int, int, int], out_channels: int, num_class_embeddings: int
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
        attention = [2**level in config.attention_factors for level in range(len(channels))]
        self.class_embedding = nn.Embedding(num_class_embeddings, config.class_channels)
        self.unet: Any = UNet2DConditionModel(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(channels),
            layers_per_block=config.num_res_blocks,
            down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
            cross_attention_dim=config.class_channels,
            attention_head_dim=tuple(
                count // config.head_channels for count in channels
            ),  # the parameter is the number of heads
            norm_num_groups=GROUPS,
        )
        self.initialize()

    def initialize(self) -> None:
        """As LDM's code: the last layer of each block and of the network starts at 0 (diffusers: PyTorch's)."""
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
