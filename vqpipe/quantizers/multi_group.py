"""`multi_group`: the channels of the latent in groups, each with its own codebook, the quantizer of MGVQ.

Jia et al. 2025, "MGVQ: Could VQ-VAE Beat VAE? A Generalizable Tokenizer with Multi-group Quantization", section 3.
Shapes: B images, C channels, G groups, K codes of one group, h x w positions, N = h * w * G ids per image.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import (
    CodebookConfig,
    CodebookQuantizer,
    Quantized,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
    by_image,
    to_rows,
)
from vqpipe.quantizers.cvq import CvqConfig
from vqpipe.search import nearest


@dataclass(frozen=True, kw_only=True)
class MultiGroupConfig(QuantizerConfig):
    """G quantizers of one config; the defaults are MGVQ's G4, 4 codebooks of 8192 codes with 8 channels."""

    kind: ClassVar[str] = "multi_group"

    num_groups: int = 4
    """G, ids per position."""
    group: QuantizerConfig = field(default_factory=lambda: CvqConfig(codebook_size=8192, code_dim=8, normalize=True))
    """The quantizer of each group, of any kind with one id per position. Sizes are per group, never the total."""
    masking: Literal["sample", "batch", "off"] = "sample"
    """Nested masking in training: the number of groups to keep is sampled for every image, or once for the batch of a
    rank, as in the released code; "off" keeps all, as in MGVQ's fine-tuning phase."""
    keep_probabilities: tuple[float, ...] = ()
    """Probability of keeping 1, 2, ..., G groups; empty: `default_keep_probabilities`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[1, inf)", "num_groups")
        p = self.keep_probabilities
        if p and (len(p) != self.num_groups or min(p) < 0 or abs(sum(p) - 1) > 1e-6):
            raise ConfigError(
                f"keep_probabilities = {list(p)} are not {self.num_groups} probabilities that sum to 1",
                "Set one for each of 1, 2, ..., num_groups groups, or leave them out",
            )

    @property
    def needs_codebook(self) -> bool:
        return self.group.needs_codebook

    def codebook_settings(self, size: int, dim: int) -> dict[str, int]:
        """Those of each group, for its codebook or for the concatenated ones of all groups."""
        if isinstance(self.group, CodebookConfig) and size == self.num_groups * self.group.codebook_size:
            size = self.group.codebook_size
        return {f"group.{name}": value for name, value in self.group.codebook_settings(size, dim).items()}


class MultiGroupQuantizer(Quantizer):
    """Channels [g C / G, (g + 1) C / G) are quantized by group g, independently of the others.

    Nested masking (section 3, after nested dropout, Rippel et al. 2014): in training only the first k groups are kept,
    with random k, so that the first groups learn the most important information. A masked group has zero codes, ids -1,
    no loss, no codebook update and no gradient for its latent. The released code drops the ids of a masked group,
    samples for at most four groups, so that with eight the last four are never masked, and has masking commented out
    for fine-tuning; here masking is nested for any G.

    A loss is the mean of the losses over images and groups, where masked pairs count as 0: with all groups kept it has
    the scale of one quantizer over all C channels. The released code returns one loss per group; how its training sums
    them is not released.
    """

    config_class = MultiGroupConfig

    def __init__(self, config: MultiGroupConfig) -> None:
        groups = [build_quantizer(config.group) for _ in range(config.num_groups)]
        if groups[0].num_groups != 1 or type(groups[0]).layout is not Quantizer.layout:
            raise ConfigError(
                f"the {config.group.kind} quantizer gives more than one id per position, so it cannot be grouped",
                "Choose another model.quantizer.group.kind",
            )
        super().__init__(
            config,
            codebook_size=groups[0].codebook_size,
            latent_dim=config.num_groups * groups[0].latent_dim,
            num_groups=config.num_groups,
        )
        self.channel_groups = config.num_groups
        self.groups = nn.ModuleList(groups)
        self.loss_names = groups[0].loss_names  # type: ignore[misc]  # depends on the config here
        self.masking = config.masking
        self.keep_probabilities = config.keep_probabilities or default_keep_probabilities(config.num_groups)

    def forward(self, latent: Tensor) -> Quantized:
        num_kept = None if self.masking == "off" or not self.training else self.sample_num_kept(len(latent))
        ids_by_group = self.search_all_groups(latent)
        parts = [
            quantize_masked(group, part, None if num_kept is None else num_kept > number, ids_by_group[number])
            for number, (group, part) in enumerate(self.split_channels(latent))
        ]
        codes = torch.cat([part.codes for part in parts], dim=1)
        ids = torch.stack([part.ids for part in parts], dim=-1).flatten(1)
        losses = {name: torch.stack([part.losses[name] for part in parts]).mean() for name in parts[0].losses}
        return Quantized(codes, ids, losses)

    @torch.no_grad()
    def search_all_groups(self, latent: Tensor) -> list[Tensor] | list[None]:
        """The ids of each group, int64[B, h * w], from one batched search; None if groups have a forward of their own.

        Masked groups are searched too: one kernel launch costs less than one per group.
        """
        parts = [(group, part) for group, part in self.split_channels(latent) if isinstance(group, CodebookQuantizer)]
        if not parts or type(parts[0][0]).forward is not CodebookQuantizer.forward:
            return [None] * self.num_groups
        with torch.autocast(latent.device.type, enabled=False):
            vectors = torch.stack([to_rows(group.search_input(part)) for group, part in parts])
            codebooks = torch.stack([group.codebook() for group, _ in parts])
            ids = nearest(vectors, codebooks, parts[0][0].metric, check=not self.training)
        return [by_image(group_ids, latent) for group_ids in ids]

    def sample_num_kept(self, batch_size: int) -> Tensor:
        """Sample the number of groups each image keeps, int64[B] on the CPU, from the default CPU generator."""
        uniform = torch.rand(batch_size if self.masking == "sample" else 1)
        return num_kept_of(uniform, self.keep_probabilities).expand(batch_size)

    def token_codes(self, ids: Tensor) -> Tensor:
        by_group = ids.unflatten(1, (-1, self.num_groups)).unbind(-1)
        parts = zip(self.quantizers(), by_group, strict=True)
        return torch.stack([group.token_codes(part) for group, part in parts], dim=2).flatten(1, 2)

    def update(self, latent: Tensor, ids: Tensor) -> None:
        by_group = ids.unflatten(1, (-1, self.num_groups)).unbind(-1)
        for (group, part), group_ids in zip(self.split_channels(latent), by_group, strict=True):
            group.update(part, group_ids)

    @property
    def has_update(self) -> bool:
        return any(group.has_update for group in self.quantizers())

    def codebook(self) -> Tensor:
        return torch.stack([group.codebook() for group in self.quantizers()])

    def all_codes(self) -> Tensor:
        return torch.cat([group.all_codes() for group in self.quantizers()])

    def load_codebook(self, codebook: Tensor) -> None:
        """Load float[K, F] into every group, or float[G * K, F], the concatenated codebooks of the groups."""
        concatenated = len(codebook) == self.num_groups * self.codebook_size
        codebooks = codebook.chunk(self.num_groups) if concatenated else [codebook] * self.num_groups
        for group, part in zip(self.quantizers(), codebooks, strict=True):
            try:
                group.load_codebook(part)
            except ConfigError as error:  # its hint names the settings of a group
                hint = error.hint.replace("model.quantizer.", "model.quantizer.group.")
                raise ConfigError(error.what, hint) from None

    def standardize_codebook(self) -> None:
        for group in self.quantizers():
            group.standardize_codebook()

    def quantizers(self) -> list[Quantizer]:
        """The quantizers of the groups, in order."""
        return list(self.groups)  # type: ignore[arg-type]  # a ModuleList is not generic

    def split_channels(self, latent: Tensor) -> list[tuple[Quantizer, Tensor]]:
        """Pair the quantizer of each group with its channels of the latent, float[B, C / G, h, w]."""
        return list(zip(self.quantizers(), latent.chunk(self.num_groups, dim=1), strict=True))


def quantize_masked(group: Quantizer, latent: Tensor, kept: Tensor | None, ids: Tensor | None) -> Quantized:
    """Quantize the channels of one group, masking the images where `kept`, bool[B] on the CPU, is false
    (None: all are kept).

    The losses are scaled by the share of images kept. If it is 0, the weights of the group get a zero gradient, since
    DistributedDataParallel needs a gradient for each.

    Args:
        ids: the ids of the group, int64[B, h * w], if already searched.
    """
    if kept is None or kept.all():
        return quantize(group, latent, ids)
    index = kept.nonzero().flatten().to(latent.device, non_blocking=True)
    codes = torch.zeros_like(latent, dtype=torch.float32)
    masked_ids = torch.full((len(latent), group.layout(*latent.shape[2:]).num_tokens), -1, device=latent.device)
    if len(index) == 0:
        zero = codes.new_zeros(()) + sum(0 * weight.sum() for weight in group.parameters())
        return Quantized(codes + zero, masked_ids, dict.fromkeys(group.loss_names, zero))
    part = quantize(group, latent[index], None if ids is None else ids[index])
    return Quantized(
        codes.index_copy(0, index, part.codes),
        masked_ids.index_copy(0, index, part.ids),
        {name: loss * (len(index) / len(latent)) for name, loss in part.losses.items()},
    )


def quantize(group: Quantizer, latent: Tensor, ids: Tensor | None) -> Quantized:
    """`group(latent)`, without the search if `ids` are given."""
    if ids is None:
        return group(latent)
    assert isinstance(group, CodebookQuantizer)
    with torch.autocast(latent.device.type, enabled=False):
        return group.quantized(group.search_input(latent), ids)


def default_keep_probabilities(num_groups: int) -> tuple[float, ...]:
    """Probabilities of keeping 1, ..., G groups: 0.2 for one, 0.6 for all, the remaining 0.2 split evenly.

    For G = 4 they are [0.2, 0.1, 0.1, 0.6], the thresholds commented out in MGVQ's released code; the paper gives none
    for other G. For G = 2 they are [0.4, 0.6], for G = 1 [1].
    """
    if num_groups <= 2:
        return ((1.0,), (0.4, 0.6))[num_groups - 1]
    return (0.2, *[0.2 / (num_groups - 2)] * (num_groups - 2), 0.6)


def num_kept_of(uniform: Tensor, keep_probabilities: tuple[float, ...]) -> Tensor:
    """Map uniform numbers float[B] in [0, 1) to the number of groups to keep, int64[B] in 1..G, by the inverse CDF."""
    thresholds = torch.tensor(list(accumulate(keep_probabilities))[:-1], dtype=uniform.dtype)
    return 1 + torch.bucketize(uniform, thresholds, right=True)
