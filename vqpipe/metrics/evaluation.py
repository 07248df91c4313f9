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
from vqpipe.metrics.usage import CodeUsage, bits_per_pixel, usage_of
from vqpipe.weights import LPIPS_BACKBONES, find_weights, load_lpips

LPIPS_NETS: tuple[Literal["alex", "vgg"], ...] = ("alex", "vgg")


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


class Evaluation:
    """Everything measured of one tokenizer on one set of images; memory does not grow with the set.

    Call `update` batch by batch on each rank's share, then `result` once on every rank.
    """

    def __init__(
        self, config: EvalConfig, networks: FeatureNetworks, codebook_size: int, num_groups: int, device: torch.device
    ) -> None:
        self.config = config
        self.networks = networks
        self.distortion = Distortion(networks.perceptual)
        self.usage = CodeUsage(codebook_size, num_groups, device)
        self.num_tokens = 0
        self.original_features = FrechetStatistics(device=device)
        self.reconstruction_features = FrechetStatistics(device=device)
        self.reference = 0
        self.counts = self.usage.counts

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor) -> Tensor:
        """Take in uint8[B, 3, H, W] twice and their int64[B, N]; returns each image's PSNR, float64[B]."""
        psnr = self.distortion.update(originals, reconstructions)
        self.usage.update(ids)
        self.num_tokens = ids.shape[1]
        if self.networks.inception is not None:
            self.original_features.update(self.networks.inception(originals))
            self.reconstruction_features.update(self.networks.inception(reconstructions))
        self.reference = (self.reference + sum(map(pixel_digest, originals.cpu()))) % 2**256
        return psnr

    def result(self) -> dict[str, Any]:
        """The content of `metrics.json`: numbers over all ranks, and in `not_computed` why others are absent."""
        config = self.config
        distortion = self.distortion.merged()
        self.counts = self.usage.merged()
        parts = gather_objects((self.num_tokens, self.reference))
        num_tokens, reference = max(part[0] for part in parts), sum(part[1] for part in parts) % 2**256
        not_computed = dict(self.networks.absent)
        means = distortion.result()
        for name in ("psnr", "psnr_of_mean_mse", "psnr_y"):
            if name not in means:
                not_computed[name] = "every reconstruction equals its original, so the PSNR is infinite"
        rfid = self._rfid(distortion.num_images, not_computed)
        return {
            "protocol": config.protocol,
            "num_images": distortion.num_images,
            "image_size": config.image_size,
            "reference": f"{reference:064x}",
            "num_identical": distortion.num_identical,
            **means,
            "rfid": {} if rfid is None else {config.protocol: rfid},
            **usage_of(self.counts),
            "num_tokens_per_image": num_tokens,
            "bits_per_pixel": bits_per_pixel(
                num_tokens, self.usage.codebook_size, config.image_size, config.image_size
            ),
            "not_computed": not_computed,
            "weights": self.networks.sha256,
        }

    def _rfid(self, num_images: int, not_computed: dict[str, str]) -> float | None:
        if self.networks.inception is None:
            return None
        if num_images < self.config.fid_min_images:
            not_computed["rfid"] = (
                f"{num_images} images are fewer than the {self.config.fid_min_images} that a covariance of 2,048 "
                "features needs. Use more images, or set eval.fid_min_images."
            )
            return None
        return frechet_distance(self.original_features.merged(), self.reconstruction_features.merged())


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
