"""Open-MAGVIT2's image tokenizers (Luo et al. 2024), and those of WeTok and BitDance, with the same networks and names.

Open-MAGVIT2: f8 for 128 pixels and f16 for 256, of 2^18 codes; f16 pretrained on web images, of 2^14 and 2^18.
WeTok (Zhuang et al. 2025): f8 and f16 of 32 or 64 sign bits. BitDance (Ai et al. 2026): f16 of 32, f32 of 128 or 256.
"""

from collections.abc import Mapping

from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released.checkpoint import AVERAGES, UNUSED_AVERAGES, Weights
from vqpipe.models.released.family import Family
from vqpipe.quantizers import LfqConfig, MultiGroupConfig

GROUP_BITS = 8
"""Bits of an id of WeTok."""
MIN_GROUPED_BITS = 32
"""Fewest bits of WeTok and BitDance; Open-MAGVIT2 has 14 or 18."""
LAST_CONV = "encoder.conv_out.weight"
"""Its output channels are the bits of a position."""


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
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_networks(tensors) and not has_grouped_bits(tensors)

    def config(self) -> MagvitConfig:
        code_dim = self.weights.shape(LAST_CONV, 4)[0]
        return MagvitConfig(quantizer=LfqConfig(code_dim=code_dim), **self.level_sizes())

    def image_size(self) -> int:
        return 128 if self.weights.count("encoder.down.") == 4 else 256


class Wetok(OpenMagvit2):
    """The bits of a position are split into ids of 8 bits. One id of all bits would give the same images.

    Its f8 was trained on images of 256 pixels.
    """

    name = "wetok"

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_networks(tensors) and has_grouped_bits(tensors) and has_training_names(tensors)

    def config(self) -> MagvitConfig:
        bits = self.weights.shape(LAST_CONV, 4)[0]
        if self.weights.shape("decoder.conv_in.weight", 4)[1] == 2 * bits:
            raise WeightsError(
                f"{self.weights.source} has a GAN decoder, which takes as many channels of noise as of codes, so its "
                "images are not a function of the ids",
                "Use a file with a plain decoder: all but compratio768 of WeTok",
            )
        if bits % GROUP_BITS:
            raise WeightsError(
                f"{self.weights.source}: {bits} bits are not divisible into ids of {GROUP_BITS}",
                "Pass --family open-magvit2 for one id of up to 62 bits",
            )
        self.notes.append(f"read as {bits // GROUP_BITS} ids of {GROUP_BITS} bits per position")
        quantizer = MultiGroupConfig(num_groups=bits // GROUP_BITS, group=LfqConfig(code_dim=GROUP_BITS), masking="off")
        return MagvitConfig(quantizer=quantizer, **self.level_sizes())

    def image_size(self) -> int:
        return 256


class Bitdance(Wetok):
    """A file of the two networks alone. Its code has no ids; they are formed as WeTok's."""

    name = "bitdance"

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_networks(tensors) and has_grouped_bits(tensors) and not has_training_names(tensors)


def has_networks(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of Open-MAGVIT2's networks, without a stored codebook as of SimVQ."""
    networks = any(name.startswith(("encoder.mid_block.", "decoder.adaptive.")) for name in tensors)
    return networks and not any(name.startswith("quantize.embedding") for name in tensors)


def has_grouped_bits(tensors: Mapping[str, Tensor]) -> bool:
    shape = tensors[LAST_CONV].shape if LAST_CONV in tensors else ()
    return len(shape) == 4 and shape[0] >= MIN_GROUPED_BITS and shape[0] % GROUP_BITS == 0


def has_training_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are losses or moving averages, as in the state of a Lightning module."""
    return any(name.startswith(("loss.", AVERAGES)) for name in tensors)
