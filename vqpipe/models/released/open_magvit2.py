"""Open-MAGVIT2's image tokenizers (Luo et al. 2024): f8 for 128 pixels, f16 for 256, of 2^18 codes."""

from collections.abc import Collection

from torch import Tensor

from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released.checkpoint import AVERAGES_ASIDE, Weights
from vqpipe.models.released.family import Family
from vqpipe.models.released.sizes import level_sizes
from vqpipe.quantizers import LfqConfig


class OpenMagvit2(Family):
    """Networks by our own names. Lookup-free quantization has no weights, only constants, which are dropped.

    Its Lightning module keeps moving averages of all parameters beside them, and evaluates with those: so do we. The
    discriminator is taken as it was trained, with which alone the running statistics of its BatchNorms agree.
    """

    name = "open-magvit2"
    discriminator = "loss.discriminator."
    dropped = (
        "loss.perceptual_loss.",
        *(f"quantize.{constant}" for constant in ("mask", "pre_mask", "post_mask", "codebook", "zero")),
        *AVERAGES_ASIDE,
    )

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.use_averages(("encoder.", "decoder."))

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        return any(name.startswith(("encoder.mid_block.", "decoder.adaptive.")) for name in names)

    def config(self) -> MagvitConfig:
        code_dim = self.weights.shape("encoder.conv_out.weight", 4)[0]
        return MagvitConfig(quantizer=LfqConfig(code_dim=code_dim), **level_sizes(self.weights)._asdict())

    def released(self, name: str) -> str:
        return name

    def image_size(self) -> int:
        return 128 if self.weights.count("encoder.down.") == 4 else 256
