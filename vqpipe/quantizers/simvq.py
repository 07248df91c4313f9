"""`simvq`: a frozen random codebook behind one trained linear layer.

Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer".
Shapes: K codes, C channels.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vqpipe.quantizers.base import CodebookConfig
from vqpipe.quantizers.lc import FrozenCodebookQuantizer, LcConfig


@dataclass(frozen=True, kw_only=True)
class SimVqConfig(CodebookConfig):
    """SimVQ. The released code has the loss weights "codebook" 1 and "commitment" 0.25, and 128 channels."""

    kind: ClassVar[str] = "simvq"


class SimVqQuantizer(FrozenCodebookQuantizer):
    """The codebook is E W + bias, with E frozen and drawn from N(0, 1 / C): `lc` without the image features.

    Each step changes the whole codebook through W, so no code stays unused. As released: W is a square nn.Linear with
    bias and PyTorch's initialization (the paper has no bias), trained by the two losses and not by the decoder; the
    search is by squared L2 distance, without normalization.
    """

    config_class = SimVqConfig  # type: ignore[assignment]  # the base class gets the LcConfig below

    def __init__(self, config: SimVqConfig) -> None:
        super().__init__(
            LcConfig(
                codebook_size=config.codebook_size,
                code_dim=config.code_dim,
                feature_dim=config.code_dim,
                metric=config.metric,
                normalize=config.normalize,
                codebook_init="uniform",
            )
        )
        self.config = config
        nn.init.normal_(self.codes, std=config.code_dim**-0.5)
        self.projector = nn.Sequential(nn.Linear(config.code_dim, config.code_dim))

    def load_codebook(self, codebook: Tensor) -> None:
        raise self.unsupported("samples its codes at random", "Leave --codebook out, or choose kind = lc")
