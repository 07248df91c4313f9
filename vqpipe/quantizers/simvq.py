"""`simvq`: a frozen random codebook behind one learned linear layer.

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
    """SimVQ. The released code weighs "codebook" 1 and "commitment" 0.25, with 128 channels."""

    kind: ClassVar[str] = "simvq"


class SimVqQuantizer(FrozenCodebookQuantizer):
    """The codebook is C W + bias, with C frozen and drawn from N(0, 1 / C): `lc` without the image features.

    Each step moves the whole codebook through W, so no code is left behind. As released: W is a square nn.Linear with
    a bias and PyTorch's own initialisation (the paper writes W alone), learned from the two losses and not from the
    decoder; search by squared L2 distance, nothing normalised.
    """

    config_class = SimVqConfig  # type: ignore[assignment]  # `lc` is configured by the LcConfig made below

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
        raise self.unsupported("draws its codes at random", "Leave --codebook out, or choose kind = lc")
