"""IBQ's image tokenizers (Shi et al. 2024): networks by taming-transformers' names, and codes chosen another way."""

from collections.abc import Collection

from torch import Tensor

from vqpipe.models.released.checkpoint import AVERAGES_ASIDE, Weights
from vqpipe.models.released.sizes import vqgan_config
from vqpipe.models.released.taming import Taming
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import IbqConfig

TRAINED = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


class Ibq(Taming):
    """f16 with up to 262,144 codes of 256 channels. Its ids are those of the largest inner products.

    Nothing in a file tells it from a VQGAN's, so that it has to be asked for. Its Lightning module keeps moving
    averages of all parameters, and evaluates with those: so do we, where the file has them.
    """

    name = "ibq"
    dropped = (*Taming.dropped, *AVERAGES_ASIDE)

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.use_averages(TRAINED)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        return False

    def config(self) -> VqganConfig:
        codebook_size, code_dim = self.weights.shape("quantize.embedding.weight", 2)
        return vqgan_config(self.weights, IbqConfig(codebook_size=codebook_size, code_dim=code_dim))
