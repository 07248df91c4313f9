"""MGVQ (Jia et al. 2025): f8, f16 and f32, with groups of which each owns a run of rows of one stored table."""

from collections.abc import Collection

import torch
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.dcae import DcaeConfig
from vqpipe.models.released.family import Family
from vqpipe.quantizers import CvqConfig, MultiGroupConfig

TABLE = "quantize.embedding.weight"
"""float[G * K, C / G]: the groups' codebooks, one below the other. The size given to its code is this total."""
FREQUENCIES = "quantize.embed_prob"
"""float[G, K]: how often each code was used, on moving average, from which dead codes are told."""
OUR_GROUPS = "quantizer.groups."
"""What our names of the groups' tensors begin with."""
ATTENTION = "op_list.0.context_module.main.qkv.conv.weight"
RESIDUAL = "op_list.0.main.conv1.conv.weight"
"""The first convolution of a stage of EfficientViT blocks, and of one of residual blocks: both see its full width."""


class Mgvq(Family):
    """G4 and G8, told by `quant_conv`, which is grouped.

    Nested masking is off in the imported config, as in the phase that the released weights come from, fine-tuning;
    it has no part in encoding or decoding.
    """

    name = "mgvq"
    dropped = ("quantize.codebook_used",)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        return any(name.startswith("encoder.stages.") for name in names)

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
            widths=(max(1, widths[0] // 2), *widths),  # nothing is stored of the empty stage; so wide it is released
            encoder_depths=(0, *self.depths("encoder", stages)),
            decoder_depths=(0, *self.depths("decoder", stages)),
            attention_from=1 + (attends.index(True) if True in attends else len(attends)),
            latent_channels=self.latent_channels(),
        )

    def depths(self, network: str, stages: range) -> list[int]:
        """Blocks of each stage; every stage but the last holds a change of resolution as well."""
        counts = [self.weights.count(f"{network}.stages.{stage}.op_list.") for stage in stages]
        return [count - (stage != stages[-1]) for stage, count in zip(stages, counts, strict=True)]

    def quantizer(self) -> MultiGroupConfig:
        num_groups = self.num_groups()
        size, code_dim = self.weights.shape(TABLE, 2)
        if size % num_groups:
            raise WeightsError(f"{self.weights.source}: {size:,} codes do not divide into {num_groups} groups")
        if FREQUENCIES not in self.weights:
            self.notes.append("it does not say how often codes were used: fine-tuning starts with all of them in use")
        group = CvqConfig(codebook_size=size // num_groups, code_dim=code_dim, normalize=True)
        return MultiGroupConfig(num_groups=num_groups, group=group, masking="off")

    def num_groups(self) -> int:
        """G: by how much fewer channels each output of the grouped `quant_conv` sees."""
        channels, seen = self.latent_channels(), self.weights.shape("quant_conv.weight", 4)[1]
        if channels % seen:
            raise WeightsError(f"{self.weights.source}: {channels} channels do not divide into groups of {seen}")
        return channels // seen

    def latent_channels(self) -> int:
        return self.weights.shape("encoder.project_out.main.op_list.0.conv.weight", 4)[0]

    def released(self, name: str) -> str:
        if name.startswith(OUR_GROUPS):
            return TABLE if name.endswith(".codes") else FREQUENCIES
        return name

    def value(self, name: str) -> Tensor | None:
        if not name.startswith(OUR_GROUPS):
            return super().value(name)
        size = self.weights.shape(TABLE, 2)[0] // self.num_groups()
        if self.released(name) == FREQUENCIES and FREQUENCIES not in self.weights:
            return torch.full((size,), 1 / size)
        stored = super().value(name)
        assert stored is not None
        group = int(name.removeprefix(OUR_GROUPS).split(".")[0])
        rows = stored.flatten(0, stored.ndim - 2) if self.released(name) == TABLE else stored.flatten()
        return rows[group * size : (group + 1) * size].clone()
