"""`replacement`: every token replaced by the k-th nearest code, then decoded (VQGAN-LC, appendix B and Fig. 5).

Little is lost where neighboring codes are similar, much where codes are few or far apart. The paper sets k to 1, 50,
100 and 1000, and does not say whether a code is its own nearest; then k = 1 would change nothing. Here k = 1 is the
nearest *other* code, and k = 0 the plain reconstruction. The paper's images are those of 100 ImageNet classes drawn at
random: `eval --random-classes 100`. Otherwise all images of the evaluation are used.

Shapes: B images of H x W pixels, N ids per image, G groups, K codes per group, C channels of a code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqpipe.analysis.base import NO_GRID, codebooks, sampling_key
from vqpipe.distributed import gather_objects
from vqpipe.errors import ConfigError
from vqpipe.evaluation.analysis import Analysis, AnalysisInputs
from vqpipe.metrics.distortion import Distortion, mean_squared_error, psnr_of
from vqpipe.metrics.resumable import Resumable
from vqpipe.quantizers import Quantizer
from vqpipe.reports import page, pictures, plots
from vqpipe.words import counted

RANKS = (1, 50, 100, 1000)
"""The k of the paper."""
NUM_EXAMPLES = 3
MEASURED = ("psnr", "ssim")
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips_alex": "LPIPS (AlexNet)", "lpips_vgg": "LPIPS (VGG)"}
MAX_DISTANCES = 2**24
"""Distances between codes in memory at once: 128 MiB in float64."""


class Replacement(Analysis):
    """PSNR, SSIM and, with networks, LPIPS for each k below K: one decoding for each k and image.

    With groups, all ids of a position are replaced, each within the codebook of its group. The example pictures are the
    images with the lowest sampling keys, the same for any sharding.
    """

    name: ClassVar[str] = "replacement"
    state_names: ClassVar[tuple[str, ...]] = ("neighbors", "distortion", "examples", "without_layout")

    def __init__(self, inputs: AnalysisInputs) -> None:
        super().__init__(inputs)
        quantizer = inputs.tokenizer.autoencoder.quantizer
        self.ranks = [k for k in RANKS if k < quantizer.codebook_size]
        if not self.ranks:
            raise ConfigError("a codebook of one code has no other")
        self.neighbors = Neighbors(quantizer, self.ranks)
        self.distortion = {k: Distortion(inputs.perceptual, MEASURED) for k in (0, *self.ranks)}
        self.examples: list[tuple[str, str, list[bytes], list[float]]] = []
        """(sampling key, name, PNG files of the original, k = 0 and each k, their PSNR), the lowest keys first."""
        self.without_layout = 0

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        tokenizer, groups = self.inputs.tokenizer, self.inputs.tokenizer.num_groups
        if self.inputs.layout(originals, ids) is None:
            self.without_layout += len(originals)
            return
        size = (originals.shape[-2], originals.shape[-1])
        replaced = self.neighbors.find(ids.to(tokenizer.device).reshape(-1, groups))
        originals = originals.to(reconstructions.device)
        versions = [reconstructions]
        self.distortion[0].update(originals, reconstructions)
        for k, other in zip(self.ranks, replaced, strict=True):
            versions.append(tokenizer.decode(other.reshape(ids.shape), size).to(reconstructions.device))
            self.distortion[k].update(originals, versions[-1])
        self.update_examples(keys, originals, versions)

    def update_examples(self, keys: Sequence[str], originals: Tensor, versions: Sequence[Tensor]) -> None:
        """Keep the images with the lowest sampling keys."""
        for i, name in enumerate(keys):
            key = sampling_key(name)
            if len(self.examples) < NUM_EXAMPLES or key < self.examples[-1][0]:
                shown = [originals[i], *(version[i] for version in versions)]
                psnr = [float(psnr_of(mean_squared_error(shown[0][None], each[None]))) for each in shown[1:]]
                self.examples.append((key, name, [pictures.to_png(each) for each in shown], psnr))
                self.examples = sorted(self.examples)[:NUM_EXAMPLES]

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.examples = [(key, name, files, psnr) for key, name, files, psnr in state["examples"]]

    def result(self) -> dict[str, Any]:
        examples = [example for part in gather_objects(self.examples) for example in part]
        self.examples = sorted(examples)[:NUM_EXAMPLES]
        merged = {k: distortion.merged() for k, distortion in self.distortion.items()}
        num_images, without = merged[0].num_images, sum(gather_objects(self.without_layout))
        if num_images == 0:
            return {"not_computed": NO_GRID}
        rows = [{"k": k, **distortion.means()} for k, distortion in merged.items()]
        return {"rows": rows, "num_images": num_images, "num_without_layout": without, "itself_counts": False}

    def sections_of(self, result: Mapping[str, Any]) -> list[page.Section]:
        rows = result["rows"]
        curve = np.array([[row["k"], row["psnr"]] for row in rows[1:] if "psnr" in row]).reshape(-1, 2).T
        plot = plots.line_plot(
            "PSNR with every token replaced, dB",
            {"replaced": (curve[0], curve[1])},
            xlabel="k of the k-th nearest other code",
            xscale="log",
            level=("reconstruction", rows[0]["psnr"]) if "psnr" in rows[0] else None,
        )
        measured = list(dict.fromkeys(key for row in reversed(rows) for key in row if key != "k"))
        header = ["tokens", *(LABELS.get(key, key) for key in measured)]
        cells = [[label(row["k"]), *(f"{row[key]:.3f}" if key in row else "–" for key in measured)] for row in rows]
        caption = (
            f"Every token of {counted(result['num_images'], 'images')} replaced by the k-th nearest other code of its "
            "codebook before decoding (VQGAN-LC, appendix B). A code is not its own neighbor."
        )
        return [
            page.Plots("Tokens replaced by similar codes", [plot] if plot else []),
            page.Table("Tokens replaced: numbers", header, cells, caption),
            page.Pictures("Tokens replaced: pictures", [self.picture(*each[1:]) for each in self.examples]),
        ]

    def picture(self, name: str, files: Sequence[bytes], psnr: Sequence[float]) -> page.Picture:
        """An example image with its reconstruction for each k."""
        versions = [
            page.Version(label(k), file, "" if db == float("inf") else pictures.decibels(db))
            for k, file, db in zip((0, *self.ranks), files[1:], psnr, strict=True)
        ]
        return page.Picture(name, files[0], versions)


class Neighbors(Resumable):
    """`kth_nearest` of the codes that occur, each searched once: int32[K, R] per group."""

    state_names: ClassVar[tuple[str, ...]] = ("known",)

    def __init__(self, quantizer: Quantizer, ranks: list[int]) -> None:
        self.codebooks = codebooks(quantizer)
        self.ranks = ranks
        shape = (len(self.codebooks), quantizer.codebook_size, len(ranks))
        self.known = torch.full(shape, -1, dtype=torch.int32, device=self.codebooks[0].device)

    def find(self, ids: Tensor) -> Tensor:
        """int64[P, G] -> int64[R, P, G], each group in its own codebook; negative ids stay."""
        groups = []
        for codebook, known, column in zip(self.codebooks, self.known, ids.unbind(1), strict=True):
            codes = column[column >= 0].unique()
            new = codes[known[codes, 0] < 0]
            known[new] = kth_nearest(new, codebook, self.ranks).int()
            groups.append(torch.where(column[:, None] >= 0, known[column.clamp(min=0)].long(), column[:, None]))
        return torch.stack(groups, dim=-1).movedim(1, 0)


def kth_nearest(ids: Tensor, codebook: Tensor, ranks: list[int]) -> Tensor:
    """The k-th nearest *other* code of each code, for each k of `ranks`: int64[n], float32[K, C] -> int64[n, R].

    The code itself is excluded by its id, so that an equal code has distance 0. In float64, tile by tile: O(K) memory
    besides MAX_DISTANCES, and independent of the tiles except for equal codes.
    """
    codes = codebook.double()
    norms = codes.square().sum(1)
    found = torch.empty(len(ids), len(ranks), dtype=torch.int64, device=ids.device)
    columns = torch.tensor(ranks, device=ids.device) - 1
    step = max(1, MAX_DISTANCES // len(codes))
    for start in range(0, len(ids), step):
        own = ids[start : start + step]
        distances = torch.addmm(norms, codes[own], codes.T, alpha=-2)
        distances[torch.arange(len(own), device=ids.device), own] = float("inf")
        near = distances.topk(max(ranks), dim=1, largest=False, sorted=True)
        found[start : start + step] = near.indices[:, columns]
    return found


def label(k: int) -> str:
    """`1st nearest`, `50th nearest`; `reconstruction` for k = 0."""
    return "reconstruction" if k == 0 else f"{k:,}{'st' if k == 1 else 'th'} nearest"
