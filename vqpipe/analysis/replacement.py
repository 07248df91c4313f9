"""`replacement`: every token replaced by the k-th nearest code, then decoded (VQGAN-LC, appendix B and Fig. 5).

If neighbouring codes mean nearly the same, little is lost; in a codebook whose codes are few or lie far apart, much is.
The paper sets k to 1, 50, 100 and 1000 and does not say whether a code is its own nearest: then k = 1 would change
nothing. Ours leaves it out, so k = 1 is the nearest *other* code, and has the plain reconstruction beside it as k = 0.
The paper's images are those of 100 ImageNet classes drawn at random; ours are those evaluated.

Letters: B images of H x W pixels, N ids an image, G groups, K codes a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from vqpipe.analysis.base import Analysis, Subject, left_out, lot
from vqpipe.analysis.codes import Neighbours
from vqpipe.distributed import gather_objects
from vqpipe.errors import ConfigError
from vqpipe.metrics.distortion import Distortion, mean_squared_error, psnr_of
from vqpipe.reports import page, pictures, plots

RANKS = (1, 50, 100, 1000)
"""The paper's k."""
NUM_EXAMPLES = 3
MEASURED = ("psnr", "ssim")
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips_alex": "LPIPS (AlexNet)", "lpips_vgg": "LPIPS (VGG)"}


class Replacement(Analysis):
    """PSNR, SSIM and, where networks are given, LPIPS for each k that is below K; a decoding for each k and image.

    With groups every id is replaced within its own codebook, all at once. Example pictures are those of the images
    whose names' hashes are lowest, whatever the sharding.
    """

    name: ClassVar[str] = "replacement"
    state_names: ClassVar[tuple[str, ...]] = ("neighbours", "distortion", "examples", "without_layout")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        quantizer = subject.tokenizer.autoencoder.quantizer
        self.ranks = [k for k in RANKS if k < quantizer.codebook_size]
        if not self.ranks:
            raise ConfigError("a codebook of one code has no other")
        self.neighbours = Neighbours(quantizer, self.ranks)
        self.distortion = {k: Distortion(subject.perceptual, MEASURED) for k in (0, *self.ranks)}
        self.examples: list[tuple[str, str, list[bytes], list[float]]] = []
        """(lot, name, PNG files of the original, k = 0 and each k, their PSNR), the lowest lots first."""
        self.without_layout = 0

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        tokenizer, groups = self.subject.tokenizer, self.subject.tokenizer.num_groups
        if self.subject.layout(originals, ids) is None:
            self.without_layout += len(originals)
            return
        size = (originals.shape[-2], originals.shape[-1])
        replaced = self.neighbours.of(ids.to(tokenizer.device).reshape(-1, groups))
        originals = originals.to(reconstructions.device)
        versions = [reconstructions]
        self.distortion[0].update(originals, reconstructions)
        for k, other in zip(self.ranks, replaced, strict=True):
            versions.append(tokenizer.decode(other.reshape(ids.shape), size).to(reconstructions.device))
            self.distortion[k].update(originals, versions[-1])
        self._keep_examples(keys, originals, versions)

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.examples = [(drawn, name, files, psnr) for drawn, name, files, psnr in state["examples"]]

    def result(self) -> dict[str, Any]:
        examples = [example for part in gather_objects(self.examples) for example in part]
        self.examples = sorted(examples)[:NUM_EXAMPLES]
        merged = {k: distortion.merged() for k, distortion in self.distortion.items()}
        num_images, without = merged[0].num_images, sum(gather_objects(self.without_layout))
        if num_images == 0:
            return {"not_computed": "no image whose tokens lie on a grid of its own size (padded, or in tiles)"}
        rows = [{"k": k, **distortion.means()} for k, distortion in merged.items()]
        return {"rows": rows, "num_images": num_images, "num_without_layout": without, "itself_counts": False}

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        if "not_computed" in result:
            return left_out(self.name, result)
        rows = result["rows"]
        keys = [key for key in rows[-1] if key != "k"]
        cells = [[label(row["k"]), *(f"{row[key]:.3f}" if key in row else "–" for key in keys)] for row in rows]
        examples = [
            page.Picture(
                name,
                pictures.data_uri(files[0]),
                [
                    page.Version(label(k), pictures.data_uri(file), "" if db == float("inf") else f"{db:.1f} dB")
                    for k, file, db in zip((0, *self.ranks), files[1:], psnr, strict=True)
                ],
            )
            for _, name, files, psnr in self.examples
        ]
        caption = (
            f"Every token of {result['num_images']:,} images became the k-th nearest other code of its codebook before "
            "decoding (VQGAN-LC, appendix B). The code itself does not "
            "count; the reconstruction is that of the tokens as they are."
        )
        return [
            page.Plots("Tokens replaced by near codes", [self._curve(rows)]),
            page.Table(
                "Tokens replaced, in numbers", ["tokens", *(LABELS.get(key, key) for key in keys)], cells, caption
            ),
            page.Pictures("Tokens replaced, in pictures", examples),
        ]

    def _curve(self, rows: Sequence[Mapping[str, Any]]) -> page.Plot:
        curve = np.array([[row["k"], row["psnr"]] for row in rows[1:]]).T
        plot = plots.line_plot(
            "PSNR with every token replaced, dB",
            {"replaced": (curve[0], curve[1])},
            xlabel="k of the k-th nearest other code",
            xscale="log",
            level=("reconstruction", rows[0]["psnr"]),
        )
        assert plot is not None
        return plot

    def _keep_examples(self, keys: Sequence[str], originals: Tensor, versions: Sequence[Tensor]) -> None:
        for i, key in enumerate(keys):
            drawn = lot(key)
            if len(self.examples) < NUM_EXAMPLES or drawn < self.examples[-1][0]:
                shown = [originals[i], *(version[i] for version in versions)]
                psnr = [float(psnr_of(mean_squared_error(shown[0][None], each[None]))) for each in shown[1:]]
                self.examples.append((drawn, key, [pictures.to_png(each) for each in shown], psnr))
                self.examples = sorted(self.examples)[:NUM_EXAMPLES]


def label(k: int) -> str:
    """As people read it: "1st nearest"; with k = 0 nothing is replaced."""
    return "reconstruction" if k == 0 else f"{k:,}{'st' if k == 1 else 'th'} nearest"
