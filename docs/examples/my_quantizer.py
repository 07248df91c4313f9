"""A quantizer of your own in every command, with --import: each channel is rounded to -1 or 1.

vqpipe train --import my_quantizer.py --preset small --set model.quantizer.kind=corners --images IMAGES --out tokenizer
vqpipe tokenize --import my_quantizer.py --tokenizer tokenizer --images IMAGES --out tokens

Defining the class registers it under its `kind`, which is all that an artifact stores: opening an artifact imports
nothing. So every command that opens one of this kind needs --import, unless the module is part of an installed package
that declares it:

    [project.entry-points."vqpipe.plugins"]
    corners = "my_package.my_quantizer"
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqpipe.quantizers import Quantized, QuantizerConfig
from vqpipe.quantizers.base import GridQuantizer, straight_through


@dataclass(frozen=True, kw_only=True)
class CornersConfig(QuantizerConfig):
    """The corners of a cube."""

    kind: ClassVar[str] = "corners"

    code_dim: int = 8
    """Channels of a code: there are 2 ** code_dim codes."""


class CornersQuantizer(GridQuantizer):
    """Bit c of an id is 1 where channel c is positive."""

    config_class = CornersConfig
    loss_names = ("commitment",)

    def __init__(self, config: CornersConfig) -> None:
        super().__init__(config, codebook_size=2**config.code_dim, latent_dim=config.code_dim)

    def bits(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.latent_dim, device=device)

    def quantize(self, latent: Tensor) -> Quantized:
        codes = torch.where(latent > 0, 1.0, -1.0)
        ids = ((codes.permute(0, 2, 3, 1) > 0) * self.bits(latent.device)).sum(-1).flatten(1)
        return Quantized(straight_through(latent, codes), ids, {"commitment": (latent - codes).square().mean()})

    def embed(self, ids: Tensor) -> Tensor:
        return torch.where((ids & self.bits(ids.device)) > 0, 1.0, -1.0)
