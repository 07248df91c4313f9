"""taming-transformers' VQGAN (Esser et al. 2021), and latent diffusion's VQ autoencoders, which have its names.

Our networks have these names too.
"""

from collections.abc import Collection
from typing import ClassVar

from vqpipe.errors import WeightsError
from vqpipe.models.released.checkpoint import AVERAGES
from vqpipe.models.released.family import Family
from vqpipe.models.released.sizes import vqgan_config
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import VqConfig


class Taming(Family):
    """f16 with 1,024 or 16,384 codes of 256 channels; latent diffusion's f4, f8 and f16 with 3, 4 and 8."""

    name = "taming"
    discriminator = "loss.discriminator."
    dropped: ClassVar[tuple[str, ...]] = ("loss.perceptual_loss.",)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        networks = any(name.startswith("encoder.mid.") for name in names)
        return networks and any(name.startswith(("quantize.", "loss.")) for name in names)

    def config(self) -> VqganConfig:
        weights = self.weights
        if "quantize.embed.weight" in weights:
            raise WeightsError(
                f"{weights.source} is a Gumbel-softmax VQGAN, whose ids are not those of the nearest codes",
                "Take a VQGAN that was trained with a searched codebook",
            )
        if weights.under(AVERAGES):
            raise WeightsError(
                f"{weights.source} has the names of a VQGAN, but moving averages as IBQ's files do, whose ids are "
                "chosen by inner products",
                "Say --family ibq; where it is a VQGAN of your own, save its state_dict without model_ema",
            )
        codebook_size, code_dim = weights.shape("quantize.embedding.weight", 2)
        self.notes.append("its ids are those of the nearest codes; where it is IBQ's, say --family ibq")
        return vqgan_config(weights, VqConfig(codebook_size=codebook_size, code_dim=code_dim))

    def released(self, name: str) -> str:
        return name.replace("quantizer.codes", "quantize.embedding.weight")
