"""MGVQ (Jia et al. 2025): f8, f16 and f32. The codebooks of its groups are stored as one tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.dcae import DcaeConfig
from vqpipe.models.released.family import Family
from vqpipe.quantizers import CvqConfig, MultiGroupConfig

CODES = "quantize.embedding.weight"
"""float[G * K, C / G]: the concatenated codebooks of the groups. The codebook size in its code is G * K."""
FREQUENCIES = "quantize.embed_prob"
"""float[G, K]: moving averages of the frequency of each code."""
OUR_GROUPS = "quantizer.groups."
"""Prefix of our names of the tensors of groups."""
ATTENTION = "op_list.0.context_module.main.qkv.conv.weight"
RESIDUAL = "op_list.0.main.conv1.conv.weight"
"""The first convolution of a stage of EfficientViT or residual blocks; its input has the width of the stage."""


class Mgvq(Family):
    """G4 and G8; the number of groups is that of the grouped `quant_conv`.

    Nested masking is off in the imported config, as in the final fine-tuning phase of the released weights; it does not
    affect encoding or decoding.
    """

    name = "mgvq"
    ignored = ("quantize.codebook_used",)

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return any(name.startswith("encoder.stages.") for name in tensors)

    def config(self) -> DcaeConfig:
        weights = self.weights
        stages = range(1, 1 + weights.count("encoder.stages.", first=1))
        attends = [bool(weights.under(f"encoder.stages.{stage}.op_list.0.context_module.")) for stage in stages]
        first_convs = [ATTENTION if attention else RESIDUAL for attention in attends]
        widths = [
            weights.shape(f"encoder.stages.{stage}.{conv}", 4)[1]
            for stage, conv in zip(stages, first_convs, strict=True)
        ]
        return DcaeConfig(
            quantizer=self.quantizer(),
            widths=(widths[0] // 2, *widths),  # stage 0 has no weights; the released value
            encoder_depths=(0, *self.depths("encoder", stages)),
            decoder_depths=(0, *self.depths("decoder", stages)),
            attention_from=1 + (attends.index(True) if True in attends else len(attends)),
            latent_channels=self.latent_channels(),
        )

    def depths(self, network: str, stages: range) -> list[int]:
        """Blocks of each stage; all stages but the last also contain a change of resolution."""
        counts = [self.weights.count(f"{network}.stages.{stage}.op_list.") for stage in stages]
        return [count - (stage != stages[-1]) for stage, count in zip(stages, counts, strict=True)]

    def quantizer(self) -> MultiGroupConfig:
        """The config of the quantizer, from its tensors."""
        num_groups = self.num_groups()
        size, code_dim = self.weights.shape(CODES, 2)
        if size % num_groups:
            raise WeightsError(f"{self.weights.source}: {size:,} codes are not divisible into {num_groups} groups")
        if FREQUENCIES not in self.weights:
            self.notes.append("it has no frequencies of codes; fine-tuning starts with all codes equally frequent")
        group = CvqConfig(codebook_size=size // num_groups, code_dim=code_dim, normalize=True)
        return MultiGroupConfig(num_groups=num_groups, group=group, masking="off")

    def num_groups(self) -> int:
        """G, from the input channels per group of `quant_conv`."""
        channels, per_group = self.latent_channels(), self.weights.shape("quant_conv.weight", 4)[1]
        if channels % per_group:
            raise WeightsError(
                f"{self.weights.source}: {channels} channels are not divisible into groups of {per_group}"
            )
        return channels // per_group

    def latent_channels(self) -> int:
        """Channels of the encoder's output."""
        return self.weights.shape("encoder.project_out.main.op_list.0.conv.weight", 4)[0]

    def released_name(self, name: str) -> str:
        if name.startswith(OUR_GROUPS):
            return CODES if name.endswith(".codes") else FREQUENCIES
        return name

    def value(self, name: str) -> Tensor | None:
        if not name.startswith(OUR_GROUPS):
            return super().value(name)
        size = self.weights.shape(CODES, 2)[0] // self.num_groups()
        if self.released_name(name) == FREQUENCIES and FREQUENCIES not in self.weights:
            return torch.full((size,), 1 / size)
        stored = super().value(name)
        assert stored is not None
        group = int(name.removeprefix(OUR_GROUPS).split(".")[0])
        rows = stored.flatten(0, stored.ndim - 2) if self.released_name(name) == CODES else stored.flatten()
        return rows[group * size : (group + 1) * size].clone()
