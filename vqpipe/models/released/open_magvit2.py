"""Open-MAGVIT2's image tokenizers (Luo et al. 2024): f8 for 128 pixels, f16 for 256, of 2^18 codes."""

from collections.abc import Collection

from torch import Tensor

from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released.checkpoint import UNUSED_AVERAGES, Weights
from vqpipe.models.released.family import Family
from vqpipe.quantizers import LfqConfig


class OpenMagvit2(Family):
    """Tensor names are ours. Lookup-free quantization has no weights, only constants, which are ignored.

    Its Lightning module has moving averages of all parameters and evaluates with them; they are used if the file has
    them. The discriminator is not averaged, to match the running statistics of its BatchNorms.
    """

    name = "open-magvit2"
    discriminator = "loss.discriminator."
    ignored = (
        "loss.perceptual_loss.",
        *(f"quantize.{constant}" for constant in ("mask", "pre_mask", "post_mask", "codebook", "zero")),
        *UNUSED_AVERAGES,
    )

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.use_averages(("encoder.", "decoder."))

    @classmethod
    def matches(cls, names: Collection[str]) -> bool:
        return any(name.startswith(("encoder.mid_block.", "decoder.adaptive.")) for name in names)

    def config(self) -> MagvitConfig:
        code_dim = self.weights.shape("encoder.conv_out.weight", 4)[0]
        return MagvitConfig(quantizer=LfqConfig(code_dim=code_dim), **self.level_sizes())

    def image_size(self) -> int:
        return 128 if self.weights.count("encoder.down.") == 4 else 256
