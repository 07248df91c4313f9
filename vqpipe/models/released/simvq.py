"""SimVQ (Zhu et al. 2024) and DimVQ (Zhang et al. 2026): f8 for 128 pixels, up to 262,144 codes of 128 channels.

Both have the networks of Open-MAGVIT2 without adaptive norms, and a frozen codebook behind one linear layer. DimVQ's
tokenizer of 65,536 codes has batch norms.
"""

from collections.abc import Mapping

from torch import Tensor

from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released.checkpoint import UNUSED_AVERAGES, Weights
from vqpipe.models.released.family import Family
from vqpipe.quantizers import SimVqConfig

CODES = "quantize.embedding.weight"
PROJECTION = "quantize.embedding_proj."


class SimVq(Family):
    """Tensor names are ours, except those of the quantizer.

    Its Lightning module has moving averages of all trained parameters and evaluates with them; they are used if the
    file has them. The codebook is frozen, and running statistics of batch norms are not averaged.
    """

    name = "simvq"
    discriminator = "loss.discriminator."
    ignored = ("loss.perceptual_loss.", *UNUSED_AVERAGES)

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.use_averages(("encoder.", "decoder.", PROJECTION))

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        networks = any(name.startswith("encoder.mid_block.") for name in tensors)
        return networks and any(name.startswith("quantize.embedding") for name in tensors)

    def config(self) -> MagvitConfig:
        codebook_size, code_dim = self.weights.shape(CODES, 2)
        return MagvitConfig(
            quantizer=SimVqConfig(codebook_size=codebook_size, code_dim=code_dim),
            adaptive_norm=bool(self.weights.under("decoder.adaptive.")),
            norm="batch" if "encoder.norm_out.running_mean" in self.weights else "group",
            **self.level_sizes(),
        )

    def image_size(self) -> int:
        return 128

    def released_name(self, name: str) -> str:
        return name.replace("quantizer.codes", CODES).replace("quantizer.projector.0.", PROJECTION)
