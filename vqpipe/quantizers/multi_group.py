"""`multi_group`: the latent's channels in groups, each with a codebook of its own, the quantizer of MGVQ.

Jia et al. 2025, "MGVQ: Could VQ-VAE Beat VAE? A Generalizable Tokenizer with Multi-group Quantization", section 3.
Shapes: B images, C channels, G groups, K codes of one group, h x w positions, N = h * w * G ids an image.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import (
    CodebookQuantizer,
    Quantized,
    Quantizer,
    QuantizerConfig,
    TokenLayout,
    build_quantizer,
    to_rows,
)
from vqpipe.quantizers.cvq import CvqConfig
from vqpipe.search import nearest


@dataclass(frozen=True, kw_only=True)
class MultiGroupConfig(QuantizerConfig):
    """G quantizers alike, side by side; the defaults are MGVQ's G4, 4 codebooks of 8192 codes with 8 channels."""

    kind: ClassVar[str] = "multi_group"

    num_groups: int = 4
    """G, ids per position."""
    group: QuantizerConfig = field(default_factory=lambda: CvqConfig(codebook_size=8192, code_dim=8, normalize=True))
    """Each group's quantizer: of any kind with one id per position. Sizes are one group's, never the total."""
    masking: Literal["sample", "batch", "off"] = "sample"
    """Nested masking in training: how many groups to keep is drawn for every image, or once for a rank's batch, as
    in the released code; or all are kept, as in MGVQ's fine-tuning phase."""
    keep_probabilities: tuple[float, ...] = ()
    """Probability of keeping 1, 2, ..., G groups; empty: `default_keep_probabilities`."""

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ConfigError(f"num_groups = {self.num_groups} should be at least 1")
        given = self.keep_probabilities
        if given and (len(given) != self.num_groups or min(given) < 0 or abs(sum(given) - 1) > 1e-6):
            raise ConfigError(
                f"keep_probabilities = {list(given)} are not {self.num_groups} probabilities that sum to 1",
                "Give one for keeping 1, 2, ... groups each, or leave them out",
            )


class MultiGroupQuantizer(Quantizer):
    """Channels [g C / G, (g + 1) C / G) are quantized by group g, knowing nothing of the others.

    Nested masking (section 3, after nested dropout, Rippel et al. 2014): in training only the first k groups are
    kept, with k random, so that the first groups learn to carry the most. A masked group's codes are zero and its
    ids -1; it has no loss, moves no code, and its latent gets no gradient. The released code drops a masked group's
    column of ids, draws for at most four groups, so that with eight the last four always stay, and has masking
    commented out for fine-tuning; ours is nested for any G.

    A loss is the mean of the groups' losses over images and groups, a masked pair counting 0: with every group kept
    it stays on the scale of one quantizer over all C channels. The released code hands the groups' losses on one by
    one, and how its training adds them up is not released.
    """

    config_class = MultiGroupConfig

    def __init__(self, config: MultiGroupConfig) -> None:
        groups = [build_quantizer(config.group) for _ in range(config.num_groups)]
        if groups[0].num_groups != 1 or type(groups[0]).layout is not Quantizer.layout:
            raise ConfigError(
                f"the {config.group.kind} quantizer gives more than one id per position, so it cannot be a group's",
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
        self.loss_names = groups[0].loss_names  # type: ignore[misc]  # for this class they depend on the config
        self.masking = config.masking
        self.keep_probabilities = config.keep_probabilities or default_keep_probabilities(config.num_groups)

    def forward(self, latent: Tensor) -> Quantized:
        kept = self.draw_groups_kept(len(latent))
        found = self.search_together(latent)
        parts = [
            quantize_kept(group, part, kept > number, found[number])
            for number, (group, part) in enumerate(self.with_channels(latent))
        ]
        codes = torch.cat([part.codes for part in parts], dim=1)
        ids = torch.stack([part.ids for part in parts], dim=-1).flatten(1)
        losses = {name: torch.stack([part.losses[name] for part in parts]).mean() for name in self.loss_names}
        return Quantized(codes, ids, losses)

    @torch.no_grad()
    def search_together(self, latent: Tensor) -> list[Tensor] | list[None]:
        """Every group's ids, int64[B, h * w], found in one search; None where groups do not just take the nearest code.

        Masked groups are searched with the others: one launch on a GPU costs less than a launch for each.
        """
        parts = [(group, part) for group, part in self.with_channels(latent) if isinstance(group, CodebookQuantizer)]
        if not parts or type(parts[0][0]).forward is not CodebookQuantizer.forward:
            return [None] * self.num_groups
        with torch.autocast(latent.device.type, enabled=False):
            vectors = torch.stack([to_rows(group.compared(part)) for group, part in parts])
            codebooks = torch.stack([group.codebook() for group, _ in parts])
            ids = nearest(vectors, codebooks, parts[0][0].metric, check=not self.training)
        return list(ids.unflatten(1, (len(latent), -1)))

    def draw_groups_kept(self, batch_size: int) -> Tensor:
        """How many groups each image keeps: int64[B] on the CPU, whose generator draws it."""
        if self.masking == "off" or not self.training:
            return torch.full((batch_size,), self.num_groups)
        draws = torch.rand(batch_size if self.masking == "sample" else 1)
        return groups_kept(draws, self.keep_probabilities).expand(batch_size)

    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        (grid,) = layout.split(ids)
        one_group = TokenLayout(layout.grids)
        parts = zip(self.quantizers(), grid.unbind(-1), strict=True)
        return torch.cat([group.lookup(part.flatten(1), one_group) for group, part in parts], dim=1)

    def update(self, latent: Tensor, ids: Tensor) -> None:
        by_group = ids.unflatten(1, (-1, self.num_groups)).unbind(-1)
        for (group, part), group_ids in zip(self.with_channels(latent), by_group, strict=True):
            kept = group_ids[:, 0] >= 0
            group.update(part[kept], group_ids[kept])  # even of no image: other ranks may have some

    def codebook(self) -> Tensor:
        return torch.stack([group.codebook() for group in self.quantizers()])

    def load_codebook(self, codebook: Tensor) -> None:
        """Take float[K, F] for every group, or float[G * K, F], the groups' tables one below the other."""
        whole = len(codebook) == self.num_groups * self.codebook_size
        tables = codebook.chunk(self.num_groups) if whole else [codebook] * self.num_groups
        for group, table in zip(self.quantizers(), tables, strict=True):
            group.load_codebook(table)

    def standardize_codebook(self) -> None:
        for group in self.quantizers():
            group.standardize_codebook()

    def quantizers(self) -> list[Quantizer]:
        """The groups' quantizers, in order."""
        return list(self.groups)  # type: ignore[arg-type]  # a ModuleList forgets what it holds

    def with_channels(self, latent: Tensor) -> list[tuple[Quantizer, Tensor]]:
        """Each group's quantizer with its channels float[B, C / G, h, w] of the latent."""
        return list(zip(self.quantizers(), latent.chunk(self.num_groups, dim=1), strict=True))


def quantize_kept(group: Quantizer, latent: Tensor, kept: Tensor, found: Tensor | None) -> Quantized:
    """What `group` makes of its channels of the images where `kept`, bool[B] on the CPU; the others are masked.

    `found` are its ids, int64[B, h * w], where they have been searched for.

    Its losses are scaled by the share of images kept. Where there is none, its weights get a zero gradient rather
    than none, which DistributedDataParallel would wait for.
    """
    if kept.all():
        return quantize(group, latent, found)
    chosen = kept.nonzero().flatten().to(latent.device, non_blocking=True)
    codes = torch.zeros_like(latent, dtype=torch.float32)
    ids = torch.full((len(latent), group.layout(*latent.shape[2:]).num_tokens), -1, device=latent.device)
    if len(chosen) == 0:
        zero = codes.new_zeros(()) + sum(0 * weight.sum() for weight in group.parameters())
        return Quantized(codes + zero, ids, dict.fromkeys(group.loss_names, zero))
    part = quantize(group, latent[chosen], None if found is None else found[chosen])
    return Quantized(
        codes.index_copy(0, chosen, part.codes),
        ids.index_copy(0, chosen, part.ids),
        {name: loss * (len(chosen) / len(latent)) for name, loss in part.losses.items()},
    )


def quantize(group: Quantizer, latent: Tensor, found: Tensor | None) -> Quantized:
    """`group(latent)`, without the search where its ids are known."""
    if found is None:
        return group(latent)
    assert isinstance(group, CodebookQuantizer)
    with torch.autocast(latent.device.type, enabled=False):
        return group.replaced(group.compared(latent), found)


def default_keep_probabilities(num_groups: int) -> tuple[float, ...]:
    """Probabilities of keeping 1, ..., G groups: 0.2 for the first alone, 0.6 for all, the rest even between.

    For G = 4 they are [0.2, 0.1, 0.1, 0.6], the thresholds commented out in MGVQ's released code; the paper states
    none for other G. With nothing between, the first alone has the rest: [0.4, 0.6] for G = 2, [1] for G = 1.
    """
    if num_groups <= 2:
        return ((1.0,), (0.4, 0.6))[num_groups - 1]
    return (0.2, *[0.2 / (num_groups - 2)] * (num_groups - 2), 0.6)


def groups_kept(draws: Tensor, keep_probabilities: tuple[float, ...]) -> Tensor:
    """Uniform draws float[B] in [0, 1) -> how many groups are kept, int64[B] in 1..G: few where the draw is small."""
    thresholds = torch.tensor(list(accumulate(keep_probabilities))[:-1], dtype=draws.dtype)
    return 1 + torch.bucketize(draws, thresholds, right=True)
