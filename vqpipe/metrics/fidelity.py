"""How near reconstructions come to their originals under one protocol: distortion, and distances between sets.

Letters: B images of H x W pixels.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqpipe.distributed import gather_objects, world_size
from vqpipe.errors import DataError
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.distortion import Distortion
from vqpipe.metrics.fid import FrechetStatistics, frechet_distance
from vqpipe.metrics.networks import FeatureNetworks, feature_size
from vqpipe.metrics.populations import Asked, Population
from vqpipe.metrics.protocols import Protocol, grey_levels, stored
from vqpipe.metrics.set_metrics import KEPT, inception_score, kid, on_main, precision_recall, too_few
from vqpipe.metrics.state import Accumulator

SIDES = 2
"""Originals and reconstructions, which share the limit on kept features."""


def asked_of(
    config: EvalConfig, networks: FeatureNetworks, device: torch.device | None = None, *, curve: bool = False
) -> Asked:
    """What an evaluation gathers of each image: for a k-curve the moments of FID alone; extractors only with a
    `device`, on which their size is found."""
    if curve:
        return Asked(moments=("pool",))
    kept = dict.fromkeys(KEPT[name] for name in config.metrics if name in KEPT)
    sizes = {}
    if device is not None:
        sizes = {name: feature_size(name, network, device) for name, network in networks.extractors.items()}
    return Asked(
        moments=("pool", "spatial") if "sfid" in config.metrics else ("pool",),
        kept=tuple(kept),
        most_bytes=config.feature_memory * 1e9 / SIDES / max(len(kept), 1) / world_size(),
        extractor_sizes=sizes,
    )


class Fidelity(Accumulator):
    """One series of reconstructions beside the originals: distortion, and what feature networks see of it."""

    accumulates: ClassVar[tuple[str, ...]] = ("distortion", "seen")

    def __init__(
        self,
        protocol: Protocol,
        networks: FeatureNetworks,
        asked: Asked,
        device: torch.device,
        keys: Collection[str],
        perceptual: Mapping[str, nn.Module],
    ) -> None:
        self.protocol = protocol
        self.distortion = Distortion(perceptual, keys)
        self.seen = Population(networks, protocol.resize, asked, device)

    def update(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Take in uint8[B, 3, H, W] and float in [-1, 1] (or uint8); returns each image's PSNR, float64[B]."""
        levels = grey_levels(reconstructions)
        pixels = stored(levels, self.protocol.rounding)
        self.seen.update(pixels)
        return self.distortion.update(originals, pixels, levels)

    def numbers(self, name: str, originals: FrechetStatistics | None) -> dict[str, Any]:
        """Means over all ranks, and `rfid` where the originals' statistics over all ranks are given."""
        means: dict[str, Any] = self.distortion.merged().result()
        if originals is None:
            return means
        return means | {"rfid": {name: frechet_distance(originals, self.seen.merged_moments()["pool"])}}


@dataclass(frozen=True)
class Compared:
    """What one protocol found, over all ranks."""

    protocol: Protocol
    means: dict[str, float]
    """By convention."""
    distances: dict[str, Any]
    """rfid, sfid, kid, prc, is: those that could be computed."""
    frechet: dict[str, float]
    """By the user's extractor."""
    reference: str
    """Digest of the set of crops."""
    num_identical: int

    def numbers(self, keys: Collection[str], perceptual: Collection[str]) -> dict[str, Any]:
        """The means of these conventions, and of LPIPS."""
        return {name: value for name, value in self.means.items() if name in (*keys, *perceptual)}

    def to_table(self, image_size: int | str) -> dict[str, Any]:
        """For `metrics.json`: this protocol's own numbers, then what it fixes."""
        protocol = self.protocol
        own = {"psnr": protocol.psnr, "ssim": protocol.ssim, "lpips": protocol.lpips}
        numbers: dict[str, Any] = {name: self.means[key] for name, key in own.items() if key in self.means}
        return {**numbers, **self.distances, **protocol.to_table(image_size), "reference_digest": self.reference}


class Comparison(Fidelity):
    """A series of reconstructions with the references it is compared to.

    Args:
        keys: conventions to measure beside the protocol's own.
        whole_images: they are not cropped, so that each is its own raw image.
    """

    accumulates: ClassVar[tuple[str, ...]] = (*Fidelity.accumulates, "references", "digest")

    def __init__(
        self,
        protocol: Protocol,
        networks: FeatureNetworks,
        asked: Asked,
        device: torch.device,
        keys: Collection[str],
        perceptual: Mapping[str, nn.Module],
        *,
        whole_images: bool = False,
    ) -> None:
        super().__init__(protocol, networks, asked, device, {*keys, protocol.psnr, protocol.ssim}, perceptual)
        self.references = Population(networks, protocol.resize, asked, device)
        self.needs_raw = protocol.reference == "raw" and networks.inception is not None and not whole_images
        self.digest = 0
        self.merged_originals: FrechetStatistics | None = None
        """Set by `result`, where rFID can be computed."""

    def update(self, originals: Tensor, reconstructions: Tensor, raw: Tensor | None = None) -> Tensor:
        """As `Fidelity.update`; `raw`, float[B, 3, 299, 299], are the references of a protocol that takes raw images.

        Raises:
            DataError: they are needed and absent.
        """
        psnr = super().update(originals, reconstructions)
        if self.needs_raw and raw is None:
            raise DataError(f"protocol {self.protocol.name} compares with raw images, and none were given")
        self.references.update(originals, raw if self.needs_raw else None)
        self.digest = (self.digest + sum(map(pixel_digest, originals.cpu()))) % 2**256
        return psnr

    def result(self, config: EvalConfig, num_images: int, not_computed: dict[str, str]) -> Compared:
        """The numbers over all ranks, which all call it; `not_computed` takes the reasons of those that are absent."""
        whole = self.distortion.merged()
        references = sum(gather_objects(self.digest)) % 2**256
        return Compared(
            protocol=self.protocol,
            means=whole.result(),
            distances=self._moment_distances(config, num_images, not_computed)
            | self._kept_distances(config, num_images, not_computed),
            frechet=self._named_distances(config, num_images, not_computed),
            reference=f"{references:064x}",
            num_identical=whole.num_identical,
        )

    def _moment_distances(self, config: EvalConfig, num_images: int, absent: dict[str, str]) -> dict[str, float]:
        """`rfid` and `sfid`."""
        names = {"rfid": "pool"} | ({"sfid": "spatial"} if "sfid" in config.metrics else {})
        if self.seen.inception is None:
            absent |= {name: absent.get("rfid", "no Inception") for name in names}
            return {}
        if num_images < config.fid_min_images:
            reason = (
                f"{num_images} images are fewer than the {config.fid_min_images} that a covariance of 2,048 features "
                "needs. Use more images, or name a smaller --fid-min-images."
            )
            absent |= dict.fromkeys(names, reason)
            return {}
        originals, seen = self.references.merged_moments(), self.seen.merged_moments()
        self.merged_originals = originals["pool"]
        return {name: frechet_distance(originals[output], seen[output]) for name, output in names.items()}

    def _kept_distances(self, config: EvalConfig, num_images: int, absent: dict[str, str]) -> dict[str, Any]:
        """`kid`, `prc` and `is`."""
        asked = [name for name in config.metrics if name in KEPT]
        if self.seen.inception is None:
            absent |= {name: absent.get("rfid", "no Inception") for name in asked}
            return {}
        outputs = dict.fromkeys(KEPT[name] for name in asked)
        originals, seen = self.references.merged_kept(outputs), self.seen.merged_kept(outputs)
        found = {}
        for name in asked:
            mine, theirs = seen[KEPT[name]], originals[KEPT[name]]
            if (reason := too_few(name, num_images)) is not None:
                absent[name] = reason
            elif mine is None or theirs is None:
                absent[name] = (
                    f"the features of {num_images} images are more than the {config.feature_memory:g} GB of "
                    "eval.feature_memory. Raise it where there is memory."
                )
            elif name == "is":
                found["inception_score"] = on_main(inception_score, mine)
                found["inception_score_of_originals"] = on_main(inception_score, theirs)
            else:
                found[name] = on_main({"kid": kid, "prc": precision_recall}[name], mine, theirs)
        return found

    def _named_distances(self, config: EvalConfig, num_images: int, absent: dict[str, str]) -> dict[str, float]:
        """The Frechet distance over each extractor of the user's, which needs more images than it has features."""
        originals, seen = self.references.merged_named(), self.seen.merged_named()
        found = {}
        for name, moments in seen.items():
            least = min(config.fid_min_images, len(moments.sum) + 1)
            if num_images < least:
                absent[f"frechet {name}"] = (
                    f"{num_images} images are fewer than the {least} that a covariance of {len(moments.sum)} features "
                    "needs. Use more images, or name a smaller --fid-min-images."
                )
            else:
                found[name] = frechet_distance(originals[name], moments)
        return found


def pixel_digest(image: Tensor) -> int:
    """sha256 of one uint8[3, H, W] and its size, as an integer: sums of these identify a set of images in any order."""
    header = "x".join(map(str, image.shape)).encode()
    return int.from_bytes(hashlib.sha256(header + image.contiguous().numpy().tobytes()).digest(), "big")
