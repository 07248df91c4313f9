"""One pass over originals, reconstructions and ids -> every number of `metrics.json`, or the reason it is absent.

A protocol fixes how images are cut, what the reference is, how values are rounded and which network looks at them.
"adm": ADM's centre crop on both sides, reconstructions rounded to uint8, the reference being the same crops, and
torch-fidelity's Inception; every image counts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqpipe.distributed import gather_objects
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.metrics.distortion import Distortion
from vqpipe.metrics.fid import INCEPTION_FILE, FrechetStatistics, InceptionFeatures, frechet_distance
from vqpipe.metrics.usage import CodeUsage, bits_per_pixel, no_counts, usage_of
from vqpipe.weights import LPIPS_BACKBONES, find_weights, load_lpips

LPIPS_NETS: tuple[Literal["alex", "vgg"], ...] = ("alex", "vgg")
CODE_NUMBERS = ("utilization", "utilization_per_group", "perplexity_per_group", "bits_per_pixel")
"""What only a tokenizer has."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Section [eval]: how a tokenizer is measured."""

    protocol: Literal["adm"] = "adm"
    """Which convention fixes crop, reference, rounding and feature network (see the module)."""
    image_size: int = 256
    """Side of the square centre crops, pixels."""
    batch_size: int = 32
    """Images a rank reconstructs at once."""
    max_skipped: float = 0.0
    """Largest share of unreadable images before the evaluation is refused, 0..1."""
    fid_min_images: int = 2049
    """Fewer images than this leave rfid out: below the 2,048 feature dimensions the covariance has no full rank."""
    num_pictures: int = 12
    """How many images the report shows, spread evenly over the set."""
    prefixes: bool = True
    """Decode also with the first k groups alone, k = 1..G, where a tokenizer has G > 1 groups or depths: one encoding
    and G decodings an image (the k-curve of MGVQ, Table 6)."""

    def __post_init__(self) -> None:
        if min(self.image_size, self.batch_size) < 1 or self.num_pictures < 0 or self.fid_min_images < 2:
            raise ConfigError(
                "eval.image_size and eval.batch_size start at 1, eval.num_pictures at 0, eval.fid_min_images at 2"
            )
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"eval.max_skipped = {self.max_skipped} should be a share, 0..1")


@dataclass(frozen=True)
class FeatureNetworks:
    """The pretrained networks an evaluation found, by the metric each serves, and why others are absent."""

    perceptual: dict[str, nn.Module]
    inception: nn.Module | None
    sha256: dict[str, str]
    """File name -> hash of every weights file in use."""
    absent: dict[str, str]
    """Metric -> reason."""


def find_networks(folder: Path | None, device: torch.device | str = "cpu") -> FeatureNetworks:
    """Load what lies in `folder`: LPIPS backbones as torchvision names them and torch-fidelity's Inception.

    Raises:
        WeightsError: `folder` is not a directory, or a file in it is damaged. A file that is not there is a reason in
            `absent`, not an error.
    """
    if folder is not None and not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder", "Name the folder that holds the weights with --weights DIR")
    perceptual: dict[str, nn.Module] = {}
    inception: nn.Module | None = None
    sha256: dict[str, str] = {}
    absent: dict[str, str] = {}
    for net in LPIPS_NETS:
        name, what = LPIPS_BACKBONES[net]
        try:
            file = find_weights(name, folder, f"LPIPS needs {what}")
        except WeightsError as error:
            absent[f"lpips_{net}"] = str(error)
            continue
        perceptual[f"lpips_{net}"] = load_lpips(net, file).to(device)
        sha256[file.name] = hash_file(file)
    try:
        file = find_weights(INCEPTION_FILE, folder, "rFID needs torch-fidelity's Inception")
    except WeightsError as error:
        absent["rfid"] = str(error)
    else:
        inception = InceptionFeatures(file).to(device)
        sha256[file.name] = hash_file(file)
    return FeatureNetworks(perceptual, inception, sha256, absent)


class Fidelity:
    """How near reconstructions come to their originals: distortion, and the features that rFID compares."""

    def __init__(self, networks: FeatureNetworks, device: torch.device) -> None:
        self.inception = networks.inception
        self.distortion = Distortion(networks.perceptual)
        self.features = FrechetStatistics(device=device) if networks.inception is not None else None

    def update(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Take in uint8[B, 3, H, W] twice; returns each image's PSNR, float64[B]."""
        if self.inception is not None and self.features is not None:
            self.features.update(self.inception(reconstructions))
        return self.distortion.update(originals, reconstructions)

    def result(self, originals: FrechetStatistics | None, protocol: str) -> dict[str, Any]:
        """Means over all ranks, and `rfid` where the originals' statistics over all ranks are given."""
        means: dict[str, Any] = self.distortion.merged().result()
        if originals is None or self.features is None:
            return means
        return means | {"rfid": {protocol: frechet_distance(originals, self.features.merged())}}


class Evaluation:
    """Everything measured of one autoencoder on one set of images; memory does not grow with the set.

    Call `update` batch by batch on each rank's share, then `result` once on every rank.

    Args:
        codebook_size: K, or None for continuous latents: then nothing is said of codes and bits.
        num_groups: G. Beyond one, and with `config.prefixes`, the first k groups are measured too.
    """

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
        self.num_tokens = 0
        self.original_features = FrechetStatistics(device=device) if networks.inception is not None else None
        self.whole = Fidelity(networks, device)
        self.prefixes = {groups: Fidelity(networks, device) for groups in range(1, num_groups) if config.prefixes}
        """By k < G, of the reconstructions from the first k groups."""
        self.reference = 0
        self.counts = no_counts(0, 0)
        """int64[G, K] over all ranks, once `result` was called; [0, 0] for continuous latents."""

    def update(
        self,
        originals: Tensor,
        reconstructions: Tensor,
        ids: Tensor | None,
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Take in uint8[B, 3, H, W] twice and their int64[B, N], if any; returns each image's PSNR, float64[B].

        `prefixes` holds for every k of `self.prefixes` the reconstructions from the first k groups.
        """
        psnr = self.whole.update(originals, reconstructions)
        for groups, fidelity in self.prefixes.items():
            fidelity.update(originals, (prefixes or {})[groups])
        if self.usage is not None and ids is not None:
            self.usage.update(ids)
            self.num_tokens = ids.shape[1]
        if self.networks.inception is not None and self.original_features is not None:
            self.original_features.update(self.networks.inception(originals))
        self.reference = (self.reference + sum(map(pixel_digest, originals.cpu()))) % 2**256
        return psnr

    def result(self) -> dict[str, Any]:
        """The content of `metrics.json`: numbers over all ranks, and in `not_computed` why others are absent."""
        config, distortion = self.config, self.whole.distortion
        shares = gather_objects((distortion.num_images, distortion.num_identical, self.reference, self.num_tokens))
        num_images, num_identical, reference = (sum(share[i] for share in shares) for i in range(3))
        self.num_tokens = max(share[3] for share in shares)  # a rank may have had no image
        not_computed = dict(self.networks.absent)
        originals = self._reference_features(num_images, not_computed)
        fidelity = self.whole.result(originals, config.protocol)
        for name in ("psnr", "psnr_of_mean_mse", "psnr_y"):
            if name not in fidelity:
                not_computed[name] = "every reconstruction equals its original, so the PSNR is infinite"
        return {
            "protocol": config.protocol,
            "num_images": num_images,
            "image_size": config.image_size,
            "reference": f"{reference % 2**256:064x}",
            "num_identical": num_identical,
            "rfid": {},
            **fidelity,
            **self._code_numbers(self.usage, not_computed),
            **self._k_curve(self.usage, fidelity, originals),
            "not_computed": not_computed,
            "weights": self.networks.sha256,
        }

    def _code_numbers(self, usage: CodeUsage | None, not_computed: dict[str, str]) -> dict[str, Any]:
        if usage is None:
            not_computed |= dict.fromkeys(CODE_NUMBERS, "continuous latents: no ids")
            return {}
        self.counts = usage.merged()
        return {
            **usage_of(self.counts),
            "num_tokens_per_image": self.num_tokens,
            "bits_per_pixel": self._bits_per_pixel(usage, usage.num_groups),
        }

    def _k_curve(
        self, usage: CodeUsage | None, fidelity: dict[str, Any], originals: FrechetStatistics | None
    ) -> dict[str, Any]:
        """`prefixes`: the same numbers from the first k groups, k = 1..G, the last row being the main numbers."""
        if usage is None or not self.prefixes:
            return {}
        curve = {groups: prefix.result(originals, self.config.protocol) for groups, prefix in self.prefixes.items()}
        curve[usage.num_groups] = fidelity
        rows = [
            {"groups": groups, "bits_per_pixel": self._bits_per_pixel(usage, groups), **numbers}
            for groups, numbers in curve.items()
        ]
        return {"prefixes": rows}

    def _bits_per_pixel(self, usage: CodeUsage, groups: int) -> float:
        size = self.config.image_size
        return bits_per_pixel(self.num_tokens * groups // usage.num_groups, usage.codebook_size, size, size)

    def _reference_features(self, num_images: int, not_computed: dict[str, str]) -> FrechetStatistics | None:
        """The originals' statistics over all ranks, or None, with the reason, where rFID cannot be computed."""
        if self.original_features is None:
            return None
        if num_images < self.config.fid_min_images:
            not_computed["rfid"] = (
                f"{num_images} images are fewer than the {self.config.fid_min_images} that a covariance of 2,048 "
                "features needs. Use more images, or set eval.fid_min_images."
            )
            return None
        return self.original_features.merged()


def pixel_digest(image: Tensor) -> int:
    """sha256 of one uint8[3, H, W] and its size, as an integer: sums of these identify a set of images in any order."""
    header = "x".join(map(str, image.shape)).encode()
    return int.from_bytes(hashlib.sha256(header + image.contiguous().numpy().tobytes()).digest(), "big")


def comparable(a: Mapping[str, Any], b: Mapping[str, Any], keys: Sequence[str] = ()) -> str | None:
    """The first of `keys` at which two metrics.json differ, or None where their numbers may share a column."""
    for key in keys or ("protocol", "image_size", "num_images", "reference"):
        if a.get(key) != b.get(key):
            return key
    return None
