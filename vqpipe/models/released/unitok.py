"""UniTok (Ma et al. 2025): f16, eight codebooks of 4,096 codes of unit length.

The file is a training state with the tokenizer under trainer.unitok. It also contains a text encoder and the layers of
its contrastive loss, which are not needed for images.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.released.checkpoint import DAMAGED
from vqpipe.models.released.family import Family
from vqpipe.models.vitamin import VitaminConfig
from vqpipe.quantizers import MultiGroupConfig, VqConfig

STAGES = "encoder.patch_embed.backbone."
"""Prefix of the convolutions of the encoder."""
CODES = "quantizer.codebooks."
POSITIONS = "encoder.pos_embed"
"""float[1, 1, D], added to every token, if there is one: a constant zero in the code."""
PREFIXES = {
    "encoder.stem.": f"{STAGES}stem.",
    "encoder.stages.": f"{STAGES}stages.",
    "encoder.pool.": f"{STAGES}pool.",
    "encoder.project.": "quant_proj.",
    "decoder.project.": "post_quant_proj.",
}
"""Our prefixes -> released ones."""
BIASES = ("q_bias", "zero_k_bias", "v_bias")
"""The parts of the bias of `qkv` in the projections."""


class UniTok(Family):
    """The file of February 2025 has causal attention in the projections, under the same names as the later file."""

    name = "unitok"
    ignored = ("text_encoder.", "fc_norm.", "projection.", "logit_scale")

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return "post_quant_proj.proj.weight" in tensors and any(name.startswith(CODES) for name in tensors)

    def config(self) -> VitaminConfig:
        weights = self.weights
        self.notes.append(
            "read as the file of April 2025, with full attention in the projections; that of February 2025 has causal "
            "attention, under the same names"
        )
        num_groups = weights.count(CODES)
        weights.ignore(*(f"{CODES}{number}.vocab_usage" for number in range(num_groups)))
        codebook_size, code_dim = weights.shape(f"{CODES}0.codebook.weight", 2)
        group = VqConfig(codebook_size=codebook_size, code_dim=code_dim, normalize=True)
        widths = [weights.shape(f"{STAGES}stages.{stage}.0.conv3_1x1.weight", 4)[0] for stage in (0, 1)]
        return VitaminConfig(
            quantizer=group if num_groups == 1 else MultiGroupConfig(num_groups=num_groups, group=group, masking="off"),
            widths=(widths[0], widths[1]),
            encoder_depths=(weights.count(f"{STAGES}stages.0."), weights.count(f"{STAGES}stages.1.")),
            decoder_depths=(weights.count("decoder.up_conv2."), weights.count("decoder.up_conv3.")),
            transformer_width=weights.shape("encoder.norm.weight", 1)[0],
            transformer_depth=weights.count("encoder.blocks."),
            mlp_width=weights.shape("encoder.blocks.0.mlp.w0.weight", 2)[0],
        )

    def released_name(self, name: str) -> str:
        if name.endswith("codes"):
            return f"{CODES}{name.split('.')[2] if '.groups.' in name else 0}.codebook.weight"
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        return PREFIXES.get(prefix, "") + name.removeprefix(prefix)

    def value(self, name: str) -> Tensor | None:
        released, weights = self.released_name(name), self.weights
        if name.endswith("project.attn.qkv.bias"):
            parts = [released.replace("qkv.bias", part) for part in BIASES]
            return torch.cat([self.vector(part) for part in parts])
        if name == "encoder.pool.proj.bias" and POSITIONS in weights:
            bias, positions = self.vector(released), weights.take(POSITIONS)
            if positions is None or positions.shape != (1, 1, len(bias)):
                raise WeightsError(f"{weights.source}: {POSITIONS} is not one vector of {len(bias)} channels", DAMAGED)
            return bias + positions.flatten()
        return weights.take(released)

    def vector(self, name: str) -> Tensor:
        """A tensor of one dimension; a WeightsError if there is none of this name."""
        self.weights.shape(name, 1)
        tensor = self.weights.take(name)
        assert tensor is not None  # `shape` raises
        return tensor
