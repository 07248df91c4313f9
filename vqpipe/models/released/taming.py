"""VQGAN of taming-transformers (Esser et al. 2021), VQ autoencoders of latent diffusion, IBQ (Shi et al. 2024).

All have the same tensor names, which are also ours.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.released.checkpoint import AVERAGES, UNUSED_AVERAGES, Weights
from vqpipe.models.released.family import Family
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import IbqConfig, VqConfig


class Taming(Family):
    """f16 with 1,024 or 16,384 codes of 256 channels; latent diffusion's f4, f8 and f16 with 3, 4 and 8."""

    name = "taming"
    discriminator = "loss.discriminator."
    ignored: ClassVar[tuple[str, ...]] = ("loss.perceptual_loss.",)

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        networks = any(name.startswith("encoder.mid.block_1.") for name in tensors)
        others = any(name.startswith("quantize.quant_resi.") for name in tensors) or is_ibq(tensors)
        return networks and not others and any(name.startswith(("quantize.", "loss.")) for name in tensors)

    def config(self) -> VqganConfig:
        weights = self.weights
        if "quantize.embed.weight" in weights:
            raise WeightsError(
                f"{weights.source} is a Gumbel-softmax VQGAN, which does not select the nearest code",
                "Use a VQGAN with vector quantization",
            )
        if weights.under(AVERAGES):
            raise WeightsError(
                f"{weights.source} has the names of a VQGAN and moving averages, as files of IBQ, which selects codes "
                "by inner products",
                "Pass --family ibq; if it is your own VQGAN, save its state_dict without model_ema",
            )
        codebook_size, code_dim = weights.shape("quantize.embedding.weight", 2)
        self.notes.append("read as a VQGAN, with ids of the nearest codes; if it is an IBQ, pass --family ibq")
        return self.vqgan_config(VqConfig(codebook_size=codebook_size, code_dim=code_dim))

    def released_name(self, name: str) -> str:
        return name.replace("quantizer.codes", "quantize.embedding.weight")


class Ibq(Taming):
    """f16 with up to 262,144 codes of 256 channels. Its ids are those of the largest inner products.

    Its Lightning module has moving averages of all parameters and evaluates with them; they are used if the file has
    them. A file with them and with four residual blocks per level is detected as IBQ: taming-transformers has two
    blocks and no averages. Without the averages its files cannot be distinguished from those of a VQGAN.
    """

    name = "ibq"
    ignored = (*Taming.ignored, *UNUSED_AVERAGES)

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.use_averages(("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."))

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return is_ibq(tensors)

    def config(self) -> VqganConfig:
        codebook_size, code_dim = self.weights.shape("quantize.embedding.weight", 2)
        self.notes.append("read as IBQ, with ids of the largest inner products")
        return self.vqgan_config(IbqConfig(codebook_size=codebook_size, code_dim=code_dim))


def is_ibq(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file with the tensor names of a VQGAN has the moving averages and the depth of a released IBQ."""
    return (
        "encoder.down.0.block.3.conv1.weight" in tensors
        and "quantize.embedding.weight" in tensors
        and any(name.startswith("encoder.mid.block_1.") for name in tensors)
        and any(name.startswith(AVERAGES) for name in tensors)
    )
