"""How near a set of samples comes to a set of photographs: FID, sFID, KID, Inception Score, precision and recall.

What a protocol fixes, beside 50,000 samples and classes in equal parts:

| | adm | cleanfid-raw |
|---|---|---|
| samples | at the evaluated size, else PIL's antialiased bicubic (as MGVQ makes 256 px of 384) | the same |
| references | ADM's centre crop | whole images, squeezed to 299 x 299 with the aspect ratio lost |
| resize to 299 | bilinear as in TensorFlow 1 | PIL's bicubic of each channel (clean-fid) |
| whose | LlamaGen, MGVQ (Table 4), DiT, SiT | VQGAN-LC (Tables 4 and 5) |

Both: Inception-v3 of 2015 in torch-fidelity's conversion. IS is of 10 splits after a shuffle: in the order of their
classes a split would hold a tenth of the classes, and the score would be lower. Precision and recall have k = 3 and
compare all samples with NUM_KEPT references, as the ADM suite does, whose file holds so many; so does KID.

Statistics of the references may come from ADM's own file (VIRTUAL_imagenet256_labeled.npz), whose means and covariances
were computed by the TensorFlow graph itself.

Letters: n images, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqpipe.errors import ConfigError, DataError
from vqpipe.metrics.fid import FrechetStatistics, frechet_distance
from vqpipe.metrics.inception import SIZES
from vqpipe.metrics.populations import Population
from vqpipe.metrics.set_metrics import inception_score, kid, on_main, precision_recall, too_few
from vqpipe.weights import load_tensors

NUM_KEPT = 10_000
"""References whose features are kept, for precision, recall and KID."""
MOMENTS = {"fid": "pool", "sfid": "spatial"}
"""Distance -> the output of Inception whose mean and covariance it compares."""
NAMES = ("fid", "sfid", "inception_score", "kid", "prc")
"""What is computed where Inception's weights are there."""


@dataclass(frozen=True)
class GenerationProtocol:
    """One way of measuring, under a name; see the module."""

    name: Literal["adm", "cleanfid-raw"]
    resize: Literal["tf1", "clean"]
    raw: bool
    """Whether references are whole images."""


PROTOCOLS: Mapping[str, GenerationProtocol] = {
    protocol.name: protocol
    for protocol in (GenerationProtocol("adm", "tf1", False), GenerationProtocol("cleanfid-raw", "clean", True))
}


@dataclass
class Reference:
    """What is known of the references, over all ranks."""

    num_images: int
    moments: dict[str, FrechetStatistics] = field(default_factory=dict)
    """By output of Inception."""
    named: dict[str, FrechetStatistics] = field(default_factory=dict)
    """By the user's extractor."""
    kept: Tensor | None = None
    """float32[n, 2048], the last pooling of some of them; on rank 0."""

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        tensors = {"num_images": torch.tensor(self.num_images)}
        for group, each in (("moments", self.moments), ("named", self.named)):
            for name, statistics in each.items():
                for part in ("count", "sum", "outer"):
                    tensors[f"{group}/{name}/{part}"] = getattr(statistics, part).cpu().contiguous()
        if self.kept is not None:
            tensors["kept"] = self.kept.cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Reference":
        """Undoes `save`.

        Raises:
            WeightsError: the file is damaged.
        """
        tensors = load_tensors(path)
        groups: dict[str, dict[str, FrechetStatistics]] = {"moments": {}, "named": {}}
        for place, value in tensors.items():
            group, slash, rest = place.partition("/")
            if slash:
                name, _, part = rest.rpartition("/")
                size = len(tensors[f"{group}/{name}/sum"])
                statistics = groups[group].setdefault(name, FrechetStatistics(size, device))
                setattr(statistics, part, value.to(device))
        return cls(int(tensors["num_images"]), groups["moments"], groups["named"], tensors.get("kept"))


def read_adm_file(path: Path, device: torch.device) -> tuple[Reference, Tensor]:
    """The reference that ADM publishes, and its sample of images, uint8[n, 3, H, W].

    Raises:
        DataError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
            pairs = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
            moments = {name: of_gaussian(arrays[a], arrays[b], device) for name, (a, b) in pairs.items()}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is no reference of the ADM suite ({type(error).__name__})",
            "Fetch VIRTUAL_imagenet256_labeled.npz, or give images",
        ) from None
    for name, statistics in moments.items():
        if len(statistics.sum) != SIZES[name]:
            raise DataError(f"{path} holds {len(statistics.sum)} features where {name} has {SIZES[name]}")
    return Reference(len(images), moments), images


def of_gaussian(mean: np.ndarray, covariance: np.ndarray, device: torch.device) -> FrechetStatistics:
    """Statistics with this mean and sample covariance, as of two images."""
    statistics = FrechetStatistics(len(mean), device)
    centre = torch.from_numpy(mean).double().to(device)
    statistics.count.fill_(2)
    statistics.sum = 2 * centre
    statistics.outer = torch.from_numpy(covariance).double().to(device) + 2 * torch.outer(centre, centre)
    return statistics


def compare(
    samples: Population, reference: Reference, num_images: int, *, least: int, absent: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(numbers, reasons of those that are absent) of all ranks, which all call it.

    Args:
        num_images: samples over all ranks.
        least: fewer samples or references leave the distances of means and covariances out.
        absent: why there is no Inception, or None.
    """
    numbers: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    fewest, side = min((num_images, "samples"), (reference.num_images, "references"))
    few = f"{fewest:,} {side} are fewer than the {least:,} that a covariance of its features needs. Use more images, "
    few += "or name a smaller --fid-min-images."
    named, moments = samples.merged_named(), samples.merged_moments()
    for name, seen in named.items():
        if fewest < min(least, len(seen.sum) + 1):
            reasons[f"frechet {name}"] = few
        else:
            numbers.setdefault("frechet", {})[name] = frechet_distance(reference.named[name], seen)
    if absent is not None:
        return numbers, reasons | dict.fromkeys(NAMES, absent)
    for name, output in MOMENTS.items():
        if fewest < least:
            reasons[name] = few
        else:
            numbers[name] = frechet_distance(reference.moments[output], moments[output])
    kept = samples.merged_kept(("pool", "logits"))
    return numbers | kept_numbers(kept, reference, num_images, reasons), reasons


def kept_numbers(
    kept: Mapping[str, Tensor | None], reference: Reference, num_images: int, reasons: dict[str, str]
) -> dict[str, Any]:
    """`inception_score`, `kid` and `prc`; what is absent has its reason in `reasons`."""
    found: dict[str, Any] = {}
    pool, logits = kept["pool"], kept["logits"]
    for name, short in (("inception_score", "is"), ("kid", "kid"), ("prc", "prc")):
        fewest = num_images if short == "is" else min(num_images, reference.num_images)
        if (reason := too_few(short, fewest)) is not None:
            reasons[name] = reason
        elif pool is None or logits is None:
            reasons[name] = f"the features of {num_images:,} samples are too large to keep"
        elif short == "is":
            found[name] = on_main(inception_score, logits)
        else:
            theirs = torch.zeros(0, 1) if reference.kept is None else reference.kept
            found[name] = on_main({"kid": kid, "prc": precision_recall}[short], pool, theirs)
    return found


def protocol_of(name: str) -> GenerationProtocol:
    """The protocol of that name; a ConfigError where there is none."""
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol {name} is unknown", f"Choose {' or '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
