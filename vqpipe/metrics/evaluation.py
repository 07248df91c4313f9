"""One pass over originals, reconstructions and ids -> every number of `metrics.json`, or the reason it is absent.

The top-level numbers are those of the first protocol named, in the conventions that `distortion` lists; `protocols`
holds each protocol's own.

Letters: B images of H x W pixels, N ids an image, G groups, K codes a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqpipe.distributed import gather_objects
from vqpipe.errors import DataError
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.distortion import COMMON
from vqpipe.metrics.fidelity import Comparison, Fidelity, asked_of
from vqpipe.metrics.networks import FeatureNetworks
from vqpipe.metrics.protocols import PROTOCOLS
from vqpipe.metrics.state import Accumulator
from vqpipe.metrics.usage import CodeUsage, no_counts

CODE_NUMBERS = ("utilization", "utilization_per_group", "perplexity_per_group", "bits_per_pixel")
"""What only a tokenizer has."""
MIXED = (
    "images differ in size: bits_per_pixel is all bits over all pixels, num_tokens_per_image a mean; PSNR, SSIM and "
    "LPIPS are means over images, whatever their size"
)
INFINITE = "every reconstruction equals its original, so the PSNR is infinite"


@dataclass
class Sizes(Accumulator):
    """What the images measure; sums, so that they add up over ranks."""

    accumulates: ClassVar[tuple[str, ...]] = ("num_images", "pixels", "tokens", "first", "mixed")

    num_images: int = 0
    pixels: int = 0
    tokens: int = 0
    first: tuple[int, int, int] | None = None
    """(H, W, N) of the first image."""
    mixed: bool = False
    """Whether any image differed from the first."""

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.first = None if state["first"] is None else tuple(state["first"])

    def update(self, shape: Sequence[int], tokens: int) -> None:
        """Take in B images of [B, 3, H, W] with so many tokens each."""
        count, _, height, width = shape
        self.add(Sizes(count, count * height * width, count * tokens, (height, width, tokens)))

    def add(self, other: "Sizes") -> None:
        """Take in what another saw."""
        self.num_images += other.num_images
        self.pixels += other.pixels
        self.tokens += other.tokens
        if other.first is not None:
            self.mixed = self.mixed or other.mixed or self.first not in (None, other.first)
            self.first = self.first or other.first


class Evaluation(Accumulator):
    """Everything measured of one autoencoder on one set of images.

    Memory does not grow with the set, but for the metrics that ask for features of every image, which have a limit.
    Call `update` batch by batch on each rank's share, then `result` once on every rank.

    Args:
        codebook_size: K, or None for continuous latents: then nothing is said of codes and bits.
        num_groups: G. Beyond one, and with `config.prefixes`, the first k groups are measured too.
    """

    accumulates: ClassVar[tuple[str, ...]] = ("usage", "sizes", "whole", "others", "prefixes")

    def __init__(
        self,
        config: EvalConfig,
        networks: FeatureNetworks,
        codebook_size: int | None,
        num_groups: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.networks = networks
        self.usage = CodeUsage(codebook_size, num_groups, device) if codebook_size is not None else None
        self.sizes = Sizes()
        first, *others = (PROTOCOLS[name] for name in config.protocols)
        asked = asked_of(config, networks, device)
        native = config.image_size == "native"
        self.whole = Comparison(first, networks, asked, device, COMMON, networks.perceptual, whole_images=native)
        asked = asked_of(config, networks)
        self.others = {
            p.name: Comparison(p, networks, asked, device, (), own_lpips(p.lpips, networks), whole_images=native)
            for p in others
        }
        """By name, the protocols beside the first."""
        curve = asked_of(config, networks, curve=True)
        self.prefixes = {
            groups: Fidelity(first, networks, curve, device, COMMON, networks.perceptual)
            for groups in range(1, num_groups)
            if config.prefixes
        }
        """By k < G, of the reconstructions from the first k groups."""
        self.counts = no_counts(0, 0)
        """int64[G, K] over all ranks, once `result` was called; [0, 0] for continuous latents."""

    @property
    def needs_raw(self) -> bool:
        """Whether `update` has to be given the raw images."""
        return any(comparison.needs_raw for comparison in (self.whole, *self.others.values()))

    def update(
        self,
        originals: Tensor,
        reconstructions: Tensor,
        ids: Tensor | None,
        prefixes: Mapping[int, Tensor] | None = None,
        *,
        others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        raw: Tensor | None = None,
        places: Sequence[int] | None = None,
    ) -> Tensor:
        """Take in images as the first protocol crops them, uint8[B, 3, H, W], and what became of them.

        Args:
            reconstructions: float[B, 3, H, W] in [-1, 1], which each protocol rounds in its way, or uint8.
            ids: int64[B, N]; None where there are none.
            prefixes: for every k of `self.prefixes` the reconstructions from the first k groups.
            others: originals and reconstructions of the protocols with another crop, by name.
            raw: float[B, 3, 299, 299], the uncropped images as clean-fid resizes them, where a protocol refers to them.
            places: of each image in the set; without them nothing is said of the use of codes at token budgets.

        Returns:
            Each image's PSNR, float64[B], inf where it equals its original.

        Raises:
            DataError, NumericError: shapes or types that do not fit, NaN or infinity.
        """
        psnr = self.whole.update(originals, reconstructions, raw)
        for name, comparison in self.others.items():
            pair = (others or {}).get(name, (originals, reconstructions))
            comparison.update(*pair, raw)
        for groups, fidelity in self.prefixes.items():
            fidelity.update(originals, (prefixes or {})[groups])
        tokens = 0
        if self.usage is not None and ids is not None:
            self.usage.update(ids, start=places)
            tokens = ids.shape[1]
        self.sizes.update(originals.shape, tokens)
        return psnr

    def sizes_of_all(self) -> Sizes:
        """What the images measure, over all ranks, which all call it."""
        sizes = Sizes()
        for share in gather_objects(self.sizes):
            sizes.add(share)
        return sizes

    def result(self) -> dict[str, Any]:
        """The content of `metrics.json`: numbers over all ranks, and in `not_computed` why others are absent.

        Raises:
            DataError: there was no image.
        """
        config, sizes = self.config, self.sizes_of_all()
        if not sizes.num_images:
            raise DataError("there are no images to evaluate", "Check --images and --limit")
        not_computed = dict(self.networks.absent)
        compared = {
            comparison.protocol.name: comparison.result(config, sizes.num_images, not_computed)
            for comparison in (self.whole, *self.others.values())
        }
        main = compared[config.protocols[0]]
        fidelity: dict[str, Any] = main.numbers(COMMON, self.networks.perceptual)
        not_computed |= {key: INFINITE for key in COMMON if key.startswith("psnr") and key not in fidelity}
        rfid = {name: found.distances["rfid"] for name, found in compared.items() if "rfid" in found.distances}
        codes = self._code_numbers(self.usage, sizes, not_computed)
        return {
            "protocol": config.protocols[0],
            "num_images": sizes.num_images,
            "image_size": config.image_size,
            "reference": main.reference,
            "num_identical": main.num_identical,
            **fidelity,
            "rfid": rfid,
            **({"frechet": main.frechet} if main.frechet else {}),
            "protocols": {name: found.to_table(config.image_size) for name, found in compared.items()},
            **codes,
            **self._k_curve(self.usage, codes, fidelity, rfid),
            "not_computed": not_computed,
            "weights": self.networks.sha256,
        }

    def _code_numbers(self, usage: CodeUsage | None, sizes: Sizes, not_computed: dict[str, str]) -> dict[str, Any]:
        if usage is None:
            not_computed |= dict.fromkeys(CODE_NUMBERS, "continuous latents: no ids")
            return {}
        self.counts = usage.merged()
        numbers, reasons = usage.report(self.counts, sizes.pixels)
        not_computed |= reasons
        if sizes.mixed:
            mean = round(sizes.tokens / sizes.num_images)
            return numbers | {"num_tokens_per_image": mean, "mixed_sizes": MIXED}
        return numbers | {"num_tokens_per_image": sizes.first[2] if sizes.first else 0}

    def _k_curve(
        self, usage: CodeUsage | None, codes: dict[str, Any], fidelity: dict[str, Any], rfid: Mapping[Any, float]
    ) -> dict[str, Any]:
        """`prefixes`: the same numbers from the first k groups, k = 1..G, the last row being the main numbers."""
        if usage is None or not self.prefixes:
            return {}
        name, total = self.config.protocols[0], usage.num_groups
        originals = self.whole.merged_originals if name in rfid else None
        curve = {groups: prefix.numbers(name, originals) for groups, prefix in self.prefixes.items()}
        curve[total] = fidelity | ({"rfid": {name: rfid[name]}} if name in rfid else {})
        bits = codes["bits_per_pixel"]
        rows = [
            {"groups": groups, "bits_per_pixel": bits if groups == total else bits * groups / total, **numbers}
            for groups, numbers in curve.items()
        ]
        return {"prefixes": rows}


def own_lpips(key: str, networks: FeatureNetworks) -> dict[str, Any]:
    """The LPIPS network of that key alone, where there is one."""
    return {name: network for name, network in networks.perceptual.items() if name == key}


def comparable(a: Mapping[str, Any], b: Mapping[str, Any], keys: Sequence[str] = ()) -> str | None:
    """The first of `keys` at which two metrics.json differ, or None where their numbers may share a column."""
    for key in keys or ("protocol", "image_size", "num_images", "reference"):
        if a.get(key) != b.get(key):
            return key
    return None
