"""A minimal quantizer of your own, written from the base class: it rounds each channel.

vqpipe --import levels_quantizer.py train --preset small --images photos --set model.quantizer.kind=levels --out own
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.quantizers import Quantized, Quantizer, QuantizerConfig
from vqpipe.quantizers.base import check_finite, check_ids, straight_through


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(QuantizerConfig):
    """Channels that are rounded to evenly spaced values."""

    kind: ClassVar[str] = "levels"

    channels: int = 4
    """Channels of the latent; each has an id of its own."""
    levels: int = 16
    """Values of a channel, from -2 to 2."""


class LevelsQuantizer(Quantizer):
    """Rounds each channel to the nearest of K evenly spaced values. A channel is a group."""

    config_class = LevelsConfig
    loss_names = ("commitment",)

    def __init__(self, config: LevelsConfig) -> None:
        super().__init__(config, codebook_size=config.levels, latent_dim=config.channels, num_groups=config.channels)
        self.step = 4 / (config.levels - 1)

    def forward(self, latent: Tensor) -> Quantized:
        if not self.training:
            check_finite(latent)
        latent = latent.float()
        ids = ((latent + 2) / self.step).round().clamp(0, self.codebook_size - 1).long()
        ids = ids.permute(0, 2, 3, 1).flatten(1)  # [B, C, h, w] to [B, N]
        codes = self.lookup(ids, self.layout(*latent.shape[2:]))  # token_codes, then combine
        return Quantized(straight_through(latent, codes), ids, {"commitment": F.mse_loss(latent, codes)})

    def token_codes(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.codebook_size)
        codes = (ids * self.step - 2).masked_fill(ids < 0, 0)
        return codes.unsqueeze(-1)  # [B, N, 1]: C / G is 1

    def all_codes(self) -> Tensor:
        return self.token_codes(torch.arange(self.codebook_size)[None]).expand(self.num_groups, -1, -1)
