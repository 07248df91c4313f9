"""GSQ (Wang et al. 2024), grouped spherical quantization: f8 to f32, one codebook for all groups of channels.

The networks are those of Open-MAGVIT2 with biases and with an additional residual block where the channels change. Its
modules form one numbered list in each network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released.checkpoint import DAMAGED, Weights
from vqpipe.models.released.family import Family
from vqpipe.quantizers import MultiGroupConfig, QuantizerConfig, VqConfig

CODES = "quantizers.codebook.weight"
"""float[K, C / G]."""
NORM_EPS = 1e-5
"""PyTorch's default."""
BLOCK = {"norm1": "net.0", "conv1": "net.2", "norm2": "net.3", "conv2": "net.6", "nin_shortcut": "skip"}
"""Our names of the layers of a residual block -> those of GSQ."""
ENDS = {
    "encoder.norm_out.": "encoder.fianl_layers.0.",
    "encoder.conv_out.": "encoder.fianl_layers.2.",
    "decoder.norm_out.": "decoder.final_layers.0.",
    "decoder.conv_out.": "decoder.final_layers.2.",
}
"""Our names of the last layers -> those of GSQ."""


@dataclass(frozen=True)
class Level:
    """Numbers of the modules of one level in their list."""

    blocks: list[int]
    resample: int | None
    adaptive: int | None = None


class Gsq(Family):
    """The codes of a position are searched by cosine and decoded as stored, as in its code.

    Every group gets a copy of the codebook, which fine-tuning changes independently.
    """

    name = "gsq"
    ignored = ("zero",)

    def __init__(self, weights: Weights, codebook: Tensor | None = None) -> None:
        super().__init__(weights, codebook)
        self.names = dict(ENDS)
        """Prefixes of our names -> those of GSQ; completed by `config`."""

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        return CODES in tensors or any(name.startswith("encoder.fianl_layers.") for name in tensors)

    def config(self) -> MagvitConfig:
        down, up = self.levels("encoder"), self.levels("decoder")[::-1]
        widths = [self.weights.shape(f"encoder.blocks.{level.blocks[-1]}.net.6.weight", 4)[0] for level in down]
        base = self.weights.shape("encoder.conv_in.weight", 4)[0]
        depth = (len(down[0].blocks) - self.has_extra("encoder", down[0].blocks)) // (1 if len(down) > 1 else 2)
        if len(up) != len(down) or any(width % base for width in widths) or depth < 1:
            raise self.variant("its encoder and decoder differ in their levels")
        self.name_blocks("encoder.mid_block", "encoder", down[-1].blocks[-depth:])
        down[-1] = replace(down[-1], blocks=down[-1].blocks[:-depth])
        self.name_blocks("decoder.mid_block", "decoder", up[-1].blocks[:depth])
        up[-1] = replace(up[-1], blocks=up[-1].blocks[depth:])
        for number, (lower, upper) in enumerate(zip(down, up, strict=True)):
            for network, blocks in (("encoder", lower.blocks), ("decoder", upper.blocks)):
                if len(blocks) != depth + self.has_extra(network, blocks):
                    raise self.variant("its levels differ in the number of residual blocks")
            self.name_blocks(f"encoder.down.{number}.block", "encoder", lower.blocks)
            self.name_blocks(f"decoder.up.{number}.block", "decoder", upper.blocks)
            self.names[f"encoder.down.{number}.downsample."] = f"encoder.blocks.{lower.resample}.conv."
            self.names[f"decoder.up.{number}.upsample.conv1."] = f"decoder.blocks.{upper.resample}.conv."
            for part in ("gamma", "beta"):
                self.names[f"decoder.adaptive.{number}.{part}."] = f"decoder.blocks.{upper.adaptive}.{part}."
        return MagvitConfig(
            quantizer=self.quantizer(),
            base_channels=base,
            channel_multipliers=tuple(width // base for width in widths),
            num_res_blocks=depth,
            adaptive_norm=any(level.adaptive is not None for level in up),
            norm_eps=NORM_EPS,
            conv_bias=True,
            extra_blocks=True,
        )

    def levels(self, network: str) -> list[Level]:
        """The levels of a network in the order of its list, each ending with its change of resolution."""
        prefix = f"{network}.blocks."
        levels: list[Level] = []
        blocks: list[int] = []
        resample = adaptive = None
        count = self.weights.count(prefix)
        for number in range(count):
            parts = {name.split(".")[3] for name in self.weights.under(f"{prefix}{number}.")}
            if "net" in parts:
                blocks.append(number)
            elif "gamma" in parts:
                adaptive = number
            elif "conv" in parts:
                resample = number
            else:
                raise self.variant(f"{prefix}{number} is neither a residual block nor a resampling (is it attention?)")
            if resample is not None or number == count - 1:
                if not blocks:
                    raise self.variant("it has a level without residual blocks")
                levels.append(Level(blocks, resample, adaptive))
                blocks, resample, adaptive = [], None, None
        return levels

    def has_extra(self, network: str, blocks: list[int]) -> bool:
        """Whether the first of these residual blocks changes the channels."""
        return bool(blocks) and f"{network}.blocks.{blocks[0]}.skip.weight" in self.weights

    def name_blocks(self, ours: str, network: str, numbers: list[int]) -> None:
        """Add the names of a sequence of residual blocks."""
        for position, number in enumerate(numbers):
            for our_layer, layer in BLOCK.items():
                self.names[f"{ours}.{position}.{our_layer}."] = f"{network}.blocks.{number}.{layer}."

    def quantizer(self) -> QuantizerConfig:
        """The config of the quantizer, from its codebook and the channels of the latent."""
        size, code_dim = self.weights.shape(CODES, 2)
        channels = self.weights.shape("encoder.fianl_layers.2.weight", 4)[0]
        if channels % code_dim:
            raise WeightsError(
                f"{self.weights.source}: {channels} channels are not divisible into codes of {code_dim}", DAMAGED
            )
        if code_dim == 1:
            raise self.variant("its codes have one channel, for which cosines are only 1 and -1")
        group = VqConfig(codebook_size=size, code_dim=code_dim, metric="cosine")
        num_groups = channels // code_dim
        return group if num_groups == 1 else MultiGroupConfig(num_groups=num_groups, group=group, masking="off")

    def variant(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.weights.source} is a GSQ tokenizer that cannot be imported: {reason}")

    def released_name(self, name: str) -> str:
        if name.endswith(".codes"):
            return CODES
        prefix, _, leaf = name.rpartition(".")
        return self.names.get(f"{prefix}.", f"{prefix}.") + leaf
