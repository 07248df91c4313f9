"""The patch discriminator of the adversarial loss.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2, as in
VQGAN-LC's released code: with 2 layers, where taming-transformers has 3.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vqpipe.config import check_range


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The size of the discriminator; the defaults are VQGAN-LC's (taming-transformers and LlamaGen: 3 layers)."""

    base_channels: int = 64
    """Channels after the first convolution; each layer doubles them, up to 8 times."""
    num_layers: int = 2
    """Convolutions of stride 2."""

    def __post_init__(self) -> None:
        check_range(self, "discriminator", "[1, inf)", "base_channels", "num_layers")

    @property
    def smallest_side(self) -> int:
        """Of an image, in pixels: the last two convolutions, of stride 1, need 3 positions."""
        return 3 * 2**self.num_layers


class PatchDiscriminator(nn.Module):
    """Maps images float[B, 3, H, W] in [-1, 1] to one logit per overlapping patch, float[B, 1, h', w'].

    Convolutions are initialized from N(0, std 0.02), BatchNorm weights from N(1, std 0.02).
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiscriminatorConfig()
        widths = [config.base_channels * min(2**layer, 8) for layer in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, len(widths)):
            stride = 2 if layer < config.num_layers else 1
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)
