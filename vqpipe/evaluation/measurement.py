"""All metrics of a tokenizer's reconstructions: the numbers of `metrics.json`, or the reason of each that is missing.

The top-level numbers are those of the first protocol, in the conventions that `distortion` lists; `protocols` holds
each protocol's own.

Shapes: B images of H x W pixels, N ids per image, G groups, K codes per group.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqpipe.distributed import gather_objects, on_main, world_size
from vqpipe.errors import DataError
from vqpipe.image_size import parse_size
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.distortion import COMMON, Distortion
from vqpipe.metrics.feature_networks import FeatureNetworks, feature_size
from vqpipe.metrics.frechet import frechet_distance
from vqpipe.metrics.protocols import PROTOCOLS, Protocol, gray_levels, stored
from vqpipe.metrics.resumable import Resumable, summed
from vqpipe.metrics.set_metrics import (
    FEATURES,
    FeatureStatistics,
    SetStatistics,
    inception_score,
    set_distances,
)
from vqpipe.metrics.usage import CodeUsage, no_counts

SIDES = 2
"""Originals and reconstructions, which share the memory for features."""
CODE_NUMBERS = ("utilization", "utilization_per_group", "perplexity_per_group", "bits_per_pixel")
"""Keys of `metrics.json` that need ids."""
MIXED = (
    "images differ in size: bits_per_pixel is all bits over all pixels, num_tokens_per_image a mean; PSNR, SSIM and "
    "LPIPS are means over images, whatever their size"
)
TOO_SMALL = "every image is smaller than this metric is defined for"
INFINITE = "every reconstruction equals its original, so the PSNR is infinite"


class ProtocolMetrics(Resumable):
    """Metrics of reconstructions against originals under one protocol: distortion, and distances between the sets.

    Args:
        keys: conventions of distortion to measure, besides the protocol's own.
        perceptual: LPIPS networks by key.
        statistics: arguments of `FeatureStatistics`.
        with_references: False for reconstructions whose references are accumulated by other metrics.
        whole_images: images are not cropped, so that each is its own raw image.
    """

    state_names: ClassVar[tuple[str, ...]] = ("distortion", "reconstructions", "references", "digest")

    def __init__(
        self,
        protocol: Protocol,
        keys: Collection[str],
        perceptual: Mapping[str, nn.Module],
        statistics: Mapping[str, Any],
        *,
        networks: FeatureNetworks,
        device: torch.device,
        whole_images: bool,
        with_references: bool = True,
    ) -> None:
        self.protocol, self.networks = protocol, networks
        own = {protocol.psnr, protocol.ssim} if with_references else set()
        self.distortion = Distortion(perceptual, {*keys, *own})
        self.reconstructions = FeatureStatistics(networks, protocol.resize, device, **statistics)
        self.references: FeatureStatistics | None = None
        if with_references:
            self.references = FeatureStatistics(networks, protocol.resize, device, **statistics)
        self.needs_raw = protocol.reference == "raw" and networks.inception is not None and not whole_images
        self.digest = 0
        """Sum of the digests of all originals: identifies the set in any order."""

    def update(
        self,
        originals: Tensor,
        reconstructions: Tensor,
        raw: Tensor | None = None,
        keys: Sequence[str] | None = None,
    ) -> Tensor:
        """Accumulate uint8[B, 3, H, W] and float in [-1, 1] (or uint8); return the PSNR of each image, float64[B].

        `raw`, float[B, 3, 299, 299], are the references of a protocol that compares with raw images.

        Raises:
            DataError: `raw` is needed and absent.
        """
        levels = gray_levels(reconstructions)
        pixels = stored(levels, self.protocol.rounding)
        self.reconstructions.update(pixels)
        psnr = self.distortion.update(originals, pixels, levels, keys)
        if self.references is not None:
            if self.needs_raw and raw is None:
                raise DataError(f"protocol {self.protocol.name} compares with raw images, and none were given")
            self.references.update(originals, raw if self.needs_raw else None)
            self.digest = (self.digest + sum(map(pixel_digest, originals.cpu()))) % 2**256
        return psnr

    def distances(self, config: EvalConfig, not_computed: dict[str, str]) -> tuple[dict[str, Any], SetStatistics]:
        """rfid, sfid, kid, prc, inception_score and frechet, as far as they are computed, and the references. The
        reasons of the others are added to `not_computed`."""
        assert self.references is not None
        further = [name for name in ("sfid", *FEATURES) if name in config.metrics]
        samples, references = self.reconstructions.compute(), self.references.compute()
        absent = self.networks.inception is None
        numbers, reasons = set_distances(
            samples,
            references,
            [] if absent else ["fid", *further],
            min_images=config.fid_min_images,
            memory=f"the {config.feature_memory:g} GB of eval.feature_memory",
        )
        if absent:
            not_computed |= dict.fromkeys(["rfid", *further], not_computed.get("rfid", "no Inception"))
        for table in (numbers, reasons):
            if "fid" in table:
                table["rfid"] = table.pop("fid")
        not_computed |= reasons
        if "is" in numbers:
            numbers["inception_score"] = numbers.pop("is")
            logits: Any = references.features[FEATURES["is"]]
            numbers["inception_score_of_originals"] = on_main(partial(inception_score, logits))
        return numbers, references

    def table(
        self, means: Mapping[str, float], distances: Mapping[str, Any], size: tuple[int, int] | None
    ) -> dict[str, Any]:
        """The protocol's part of `metrics.json`: its own numbers, then what it fixes."""
        protocol = self.protocol
        own = {"psnr": protocol.psnr, "ssim": protocol.ssim, "lpips": protocol.lpips}
        numbers = {name: means[key] for name, key in own.items() if key in means}
        digest = sum(gather_objects(self.digest)) % 2**256
        return {**numbers, **distances, **protocol.to_table(size), "reference_digest": f"{digest:064x}"}


class EvaluationMetrics(Resumable):
    """Everything that is measured of one autoencoder on one set of images.

    Memory does not grow with the set, except for the features of the metrics that keep them, which have a limit.

    Args:
        codebook_size: K, or None for continuous latents, which have neither codes nor bits.
        num_groups: G. If G > 1 and with `config.prefixes`, the first k < G groups are measured too.
    """

    state_names: ClassVar[tuple[str, ...]] = ("usage", "sizes", "protocols", "prefixes")

    def __init__(
        self,
        config: EvalConfig,
        networks: FeatureNetworks,
        codebook_size: int | None,
        num_groups: int,
        device: torch.device,
    ) -> None:
        self.config, self.networks = config, networks
        self.size = parse_size(config.image_size)
        self.usage = CodeUsage(codebook_size, num_groups, device) if codebook_size is not None else None
        self.sizes: dict[str, int] = {}
        """ "H x W x N" -> number of images of that size with N tokens. Text, because a saved state is JSON."""
        features = list(dict.fromkeys(FEATURES[name] for name in config.metrics if name in FEATURES))
        statistics: dict[str, Any] = {
            "moments": ("pool", "spatial") if "sfid" in config.metrics else ("pool",),
            "features": features,
            "max_bytes": config.feature_memory * 1e9 / SIDES / max(len(features), 1) / world_size(),
        }
        sizes = {name: feature_size(name, network, device) for name, network in networks.extractors.items()}
        common: dict[str, Any] = {"networks": networks, "device": device, "whole_images": self.size is None}
        first, *others = (PROTOCOLS[name] for name in config.protocols)
        first_statistics = statistics | {"extractor_sizes": sizes}
        self.protocols = {first.name: ProtocolMetrics(first, COMMON, networks.perceptual, first_statistics, **common)}
        for protocol in others:
            lpips = {name: network for name, network in networks.perceptual.items() if name == protocol.lpips}
            self.protocols[protocol.name] = ProtocolMetrics(protocol, (), lpips, statistics, **common)
        self.prefixes = {
            groups: ProtocolMetrics(
                first, COMMON, networks.perceptual, {"moments": ("pool",)}, **common, with_references=False
            )
            for groups in range(1, num_groups)
            if config.prefixes
        }
        """By k < G, of the reconstructions from the first k groups."""

    @property
    def needs_raw(self) -> bool:
        """Whether `update` needs the raw images."""
        return any(protocol.needs_raw for protocol in self.protocols.values())

    @property
    def first(self) -> ProtocolMetrics:
        """The metrics of the first protocol."""
        return next(iter(self.protocols.values()))

    def update(
        self,
        originals: Tensor,
        reconstructions: Tensor,
        ids: Tensor | None,
        prefixes: Mapping[int, Tensor] | None = None,
        *,
        others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        raw: Tensor | None = None,
        positions: Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
    ) -> Tensor:
        """Accumulate images as the first protocol crops them, uint8[B, 3, H, W], and their reconstructions.

        Args:
            reconstructions: float[B, 3, H, W] in [-1, 1], which each protocol rounds in its own way, or uint8.
            ids: int64[B, N]; None for continuous latents.
            prefixes: for each k of `self.prefixes` the reconstructions from the first k groups.
            others: originals and reconstructions of the protocols with another crop, by name.
            raw: float[B, 3, 299, 299], the uncropped images in clean-fid's resize, for protocols that use them.
            positions: of each image in the set; without them the use of codes at token budgets is not measured.
            keys: of each image, for the list of images that are too small for a metric.

        Returns:
            The PSNR of each image, float64[B], inf where it equals its original.

        Raises:
            DataError, NumericError: shapes or types that do not fit, NaN or infinity.
        """
        pairs = dict.fromkeys(self.protocols, (originals, reconstructions)) | dict(others or {})
        psnr, *_ = [protocol.update(*pairs[name], raw, keys) for name, protocol in self.protocols.items()]
        for groups, prefix in self.prefixes.items():
            prefix.update(originals, (prefixes or {})[groups])
        tokens = 0
        if self.usage is not None and ids is not None:
            self.usage.update(ids, start=positions)
            tokens = ids.shape[1]
        size = f"{originals.shape[2]} x {originals.shape[3]} x {tokens}"
        self.sizes[size] = self.sizes.get(size, 0) + len(originals)
        return psnr

    def compute(self) -> tuple[dict[str, Any], Tensor]:
        """The content of `metrics.json`, and the counts of codes, int64[G, K] ([0, 0] for continuous latents).

        Raises:
            DataError: there were no images.
        """
        config, name = self.config, self.config.protocols[0]
        sizes = {tuple(map(int, size.split(" x "))): count for size, count in summed(self.sizes).items()}
        num_images = sum(sizes.values())
        if not num_images:
            raise DataError("there are no images to evaluate", "Check --images and --limit")
        not_computed = dict(self.networks.absent)
        tables: dict[str, dict[str, Any]] = {}
        rfid: dict[str, float] = {}
        not_measured: dict[str, Any] = {}
        for protocol in self.protocols.values():
            distortion = protocol.distortion.merged()
            distances, references = protocol.distances(config, not_computed)
            frechet = distances.pop("frechet", {})
            if protocol is self.first:
                originals, named = references.moments, frechet
                means, identical = distortion.means(), distortion.num_identical
            not_measured |= distortion.not_measured()
            rfid |= {protocol.protocol.name: distances["rfid"]} if "rfid" in distances else {}
            tables[protocol.protocol.name] = protocol.table(distortion.means(), distances, self.size)
        fidelity: dict[str, Any] = {
            key: value for key, value in means.items() if key in (*COMMON, *self.networks.perceptual)
        }
        not_computed |= {key: INFINITE for key in COMMON if key.startswith("psnr") and key not in fidelity}
        not_computed |= {name: TOO_SMALL for name, left in not_measured.items() if left["count"] == num_images}
        codes, counts = self._codes(sizes, not_computed)
        curve = self._prefixes(codes, fidelity, rfid.get(name), originals) if self.usage and self.prefixes else {}
        metrics = {
            "protocol": name,
            "num_images": num_images,
            "image_size": config.image_size,
            "reference": tables[name]["reference_digest"],
            "num_identical": identical,
            **fidelity,
            "rfid": rfid,
            **({"frechet": named} if named else {}),
            "protocols": tables,
            **codes,
            **curve,
            "not_computed": not_computed,
            **({"not_measured": not_measured} if not_measured else {}),
            "weights": self.networks.sha256,
        }
        return metrics, counts

    def _codes(
        self, sizes: Mapping[tuple[int, ...], int], not_computed: dict[str, str]
    ) -> tuple[dict[str, Any], Tensor]:
        """The numbers of codes, and their counts."""
        if self.usage is None:
            not_computed |= dict.fromkeys(CODE_NUMBERS, "continuous latents: no ids")
            return {}, no_counts(0, 0)
        pixels = sum(height * width * count for (height, width, _), count in sizes.items())
        counts, numbers, reasons = self.usage.compute(pixels)
        not_computed |= reasons
        tokens = sum(tokens * count for (_, _, tokens), count in sizes.items())
        mixed = {"mixed_sizes": MIXED} if len(sizes) > 1 else {}
        return numbers | {"num_tokens_per_image": round(tokens / sum(sizes.values()))} | mixed, counts

    def _prefixes(
        self, codes: Mapping[str, Any], fidelity: Mapping[str, Any], rfid: float | None, originals: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`prefixes`: the same numbers from the first k groups, k = 1..G; the last row is the main numbers."""
        assert self.usage is not None
        name, total, bits = self.config.protocols[0], self.usage.num_groups, codes["bits_per_pixel"]
        rows = []
        for groups, prefix in self.prefixes.items():
            numbers: dict[str, Any] = prefix.distortion.compute()
            if rfid is not None:
                moments = prefix.reconstructions.moments["pool"].merged()
                numbers["rfid"] = {name: frechet_distance(originals["pool"], moments)}
            rows.append({"groups": groups, "bits_per_pixel": bits * groups / total, **numbers})
        last = {} if rfid is None else {"rfid": {name: rfid}}
        return {"prefixes": [*rows, {"groups": total, "bits_per_pixel": bits, **fidelity, **last}]}


def pixel_digest(image: Tensor) -> int:
    """sha256 of one uint8[3, H, W] and its size, as an integer."""
    header = "x".join(map(str, image.shape)).encode()
    return int.from_bytes(hashlib.sha256(header + image.contiguous().numpy().tobytes()).digest(), "big")
