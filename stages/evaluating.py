"""The pass of `vqpipe eval` over the images: each file decoded once, cropped by every rule its protocols name, encoded
and decoded once a crop.

Letters: B images of H x W pixels, f the downsample factor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stages import console

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vqpipe.analysis import Analysis
    from vqpipe.artifacts import Draft
    from vqpipe.continuous import ContinuousAutoencoder
    from vqpipe.data.images import ImageSet
    from vqpipe.metrics import EvalConfig
    from vqpipe.metrics.evaluation import Evaluation
    from vqpipe.tokenizer import Tokenizer

RAW_SHAPE = (3, 299, 299)
"""Of an uncropped image as clean-fid resizes it, float32."""


class Views:
    """An RGB image -> all that the protocols want of it, in one tensor of bytes, as a loader process can send it.

    Args:
        rules: the crops, each uint8[3, H, W].
        size: (H, W); None for whole images, of which there is one rule.
        raw: whether the uncropped image as clean-fid resizes it follows.
    """

    def __init__(self, rules: Sequence[str], size: tuple[int, int] | None, raw: bool) -> None:
        from vqpipe.data.transforms import Framing

        self.framings = {rule: Framing(rule=rule, size=size) for rule in dict.fromkeys(rules)}  # type: ignore[arg-type]
        self.size, self.raw = size, raw

    def __call__(self, image: "Image") -> "Tensor":
        import torch

        from vqpipe.data.transforms import pixels
        from vqpipe.metrics.resizing import clean_resize

        crops = [framing(image) for framing in self.framings.values()]
        if self.size is None:
            return crops[0]
        raw = [clean_resize(pixels(image)).view(torch.uint8)] if self.raw else []
        return torch.cat([part.flatten() for part in (*crops, *raw)])

    def split(self, packed: "Tensor") -> "tuple[dict[str, Tensor], Tensor | None]":
        """A batch of them -> uint8[B, 3, H, W] by rule, and the raw images, float32[B, 3, 299, 299]."""
        import torch

        if self.size is None:
            return {next(iter(self.framings)): packed}, None
        length = 3 * self.size[0] * self.size[1]
        crops = {
            rule: packed[:, i * length : (i + 1) * length].reshape(-1, 3, *self.size)
            for i, rule in enumerate(self.framings)
        }
        rest = packed[:, len(self.framings) * length :]
        return crops, rest.contiguous().view(torch.float32).view(-1, *RAW_SHAPE) if self.raw else None


class Again(NamedTuple):
    """What became of a batch."""

    images: "Tensor"
    """float[B, 3, H, W] of about [-1, 1], from tiles too: each protocol rounds in its way."""
    ids: "Tensor | None"
    """int64[B, N], those of tiles one after another; None with continuous latents."""
    prefixes: "dict[int, Tensor]"
    """By k, from the first k groups."""


class Reconstructor:
    """Images through an autoencoder, whole or in tiles.

    Args:
        tile: images with a longer side go through in tiles of this side, pixels; None: always whole.
        prefixes: the k of groups that are decoded alone too.
    """

    def __init__(
        self, autoencoder: "Tokenizer | ContinuousAutoencoder", tile: int | None, prefixes: Sequence[int]
    ) -> None:
        self.autoencoder, self.tile, self.groups = autoencoder, tile, prefixes
        self.discrete = autoencoder.codebook_size is not None
        self.num_tiled = self.num_padded = 0

    def __call__(self, originals: "Tensor", prefixes: bool) -> Again:
        """uint8[B, 3, H, W], one image where there are tiles."""
        groups = self.groups if prefixes else ()
        height, width = originals.shape[-2:]
        if self.tile is not None and max(height, width) > self.tile:
            self.num_tiled += prefixes
            return self.in_tiles(originals[0], groups)
        from vqpipe.tiling import mirrored

        factor, autoencoder = self.autoencoder.downsample_factor, self.autoencoder
        padded, size = originals, (height, width)
        if height % factor or width % factor:
            self.num_padded += len(originals) * prefixes
            rows, columns = mirrored(height, factor), mirrored(width, factor)
            padded, size = originals[..., rows[:, None], columns], (len(rows), len(columns))
        code = autoencoder.encode(padded)
        images, *others = (
            autoencoder.decode_float(code, size, groups=k)[..., :height, :width] for k in (None, *groups)
        )
        return Again(images, code if self.discrete else None, dict(zip(groups, others, strict=True)))

    def in_tiles(self, original: "Tensor", groups: Sequence[int]) -> Again:
        """uint8[3, H, W], piece by piece."""
        import torch

        from vqpipe.tiling import OVERLAP, reconstruct_any_size

        assert self.tile is not None
        device, overlap = original.device, min(OVERLAP, self.tile // 8)
        image = original.cpu()
        whole, *others = (
            reconstruct_any_size(self.autoencoder, image, groups=k, tile=self.tile, overlap=overlap, rounded=False)
            for k in (None, *groups)
        )
        ids = None if whole.ids is None else torch.cat(whole.ids)[None].to(device)
        again = [part.image[None].to(device) for part in (whole, *others)]
        return Again(again[0], ids, dict(zip(groups, again[1:], strict=True)))


class Pass:
    """One pass over the images [0, stop), every rank its own contiguous share of whole batches."""

    def __init__(
        self,
        autoencoder: "Tokenizer | ContinuousAutoencoder",
        config: "EvalConfig",
        evaluation: "Evaluation",
        analyses: "Sequence[Analysis]",
        stop: int,
    ) -> None:
        from vqpipe.data.transforms import parse_size
        from vqpipe.metrics.protocols import PROTOCOLS
        from vqpipe.reports.chosen import ChosenPictures

        self.autoencoder, self.config, self.evaluation = autoencoder, config, evaluation
        self.analyses, self.stop = analyses, stop
        self.size = parse_size(str(config.image_size))
        self.rules: dict[str, str] = {name: PROTOCOLS[name].crop_rule(config.image_size) for name in config.protocols}
        self.reconstruct = Reconstructor(autoencoder, config.tile, list(evaluation.prefixes))
        self.pictures = ChosenPictures(stop, config.num_pictures, config.num_extremes)
        self.skipped: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        """All that was taken in, as `vqpipe.metrics.state` has it."""
        return {
            "evaluation": self.evaluation.state(),
            "analyses": [analysis.state() for analysis in self.analyses],
            "pictures": self.pictures.state(),
            "tiles": (self.reconstruct.num_padded, self.reconstruct.num_tiled),
            "skipped": self.skipped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Be where that state was saved."""
        self.evaluation.load(state["evaluation"])
        for analysis, own in zip(self.analyses, state["analyses"], strict=True):
            analysis.load(own)
        self.pictures.load(state["pictures"])
        self.reconstruct.num_padded, self.reconstruct.num_tiled = state["tiles"]
        self.skipped = state["skipped"]

    def run(self, draft: "Draft", image_set: "ImageSet", num_workers: int) -> None:
        """Measure this rank's share, from where an earlier run of the command had come; `skipped` then counts the
        unreadable images of all ranks by reason.

        Raises:
            DataError: more of them than `config.max_skipped`.
        """
        import torch

        from stages.resuming import Saving
        from vqpipe import distributed
        from vqpipe.data.batches import OrderedBatches, check_skipped

        size, tile = self.size, self.config.tile
        alone = size is None or (tile is not None and max(size) > tile)
        batch_size = 1 if alone else self.config.batch_size
        rank, ranks = distributed.rank(), distributed.world_size()
        num_batches = -(-self.stop // batch_size)
        first, last = (min(num_batches * r // ranks * batch_size, self.stop) for r in (rank, rank + 1))
        saving = Saving(draft, self.config.save_seconds, first)
        done = saving.resume(self)
        views = Views(list(self.rules.values()), size, self.evaluation.needs_raw)
        batches = OrderedBatches(
            image_set,
            image_size=max(size or (2048,)),  # what a worker's share of the shared memory is reckoned by
            batch_size=batch_size,
            start=done,
            stop=last,
            num_workers=num_workers,
            transform=views,
        )
        with console.progress("eval", last - first) as bar, torch.no_grad():
            bar.resume(done - first)
            for piece in batches.pieces():
                self.skipped = dict(Counter(self.skipped) + Counter(piece.skipped))
                if piece.batch is not None:
                    crops, raw = views.split(piece.batch.images)
                    self.measure(crops, raw, piece.batch.keys, piece.batch.indices)
                psnr = self.evaluation.whole.distortion.result().get("psnr", float("inf"))
                bar.note(f"psnr {psnr:.2f} dB")
                saving.tick(self, piece.positions.stop)
                bar.advance(len(piece.positions))
        saving.end(self, last)
        parts = distributed.gather_objects(self.skipped)
        self.skipped = dict(sorted(sum((Counter(part) for part in parts), Counter[str]()).items()))
        check_skipped(self.skipped, self.stop, self.config.max_skipped)

    def measure(
        self, crops: "Mapping[str, Tensor]", raw: "Tensor | None", keys: Sequence[str], places: Sequence[int]
    ) -> None:
        """Encode and decode each crop once, equal ones together, and show them to everything that measures."""
        import torch

        from vqpipe.data.transforms import to_uint8

        device = self.autoencoder.device
        main = next(iter(crops))
        originals = crops[main].to(device)
        again = self.reconstruct(originals, prefixes=True)
        pairs = {main: (originals, again.images)}
        for rule, crop in crops.items():
            if rule != main and torch.equal(crop, crops[main]):  # square images of the right size are cut alike
                pairs[rule] = pairs[main]
            elif rule != main:
                other = crop.to(device)
                pairs[rule] = (other, self.reconstruct(other, prefixes=False).images)
        others = {name: pairs[rule] for name, rule in self.rules.items()}
        raw = None if raw is None else raw.to(device)
        scores = self.evaluation.update(
            originals, again.images, again.ids, again.prefixes, others=others, raw=raw, places=places
        ).tolist()
        rounded = to_uint8(again.images)
        if again.ids is not None:
            for analysis in self.analyses:
                analysis.update(originals, rounded, again.ids, keys)
        self.pictures.update(keys, places, originals, rounded, scores)

    def tiles(self) -> dict[str, Any]:
        """For `metrics.json`: how many images went through padded or in tiles, and what that means; over all ranks."""
        from vqpipe.distributed import gather_objects

        counts = gather_objects((self.reconstruct.num_padded, self.reconstruct.num_tiled))
        padded, tiled = (sum(part[i] for part in counts) for i in (0, 1))
        found: dict[str, Any] = {}
        if padded:
            found["padded"] = {
                "num_images": padded,
                "how": f"mirrored to multiples of {self.autoencoder.downsample_factor} pixels, and cut back",
            }
        if tiled:
            found["tiles"] = {
                "num_images": tiled,
                "side": self.config.tile,
                "how": "overlapping tiles, blended and rounded then, as the protocol says; tokens of overlaps count "
                "each time",
            }
        return found


def described(autoencoder: "Tokenizer | ContinuousAutoencoder", size: tuple[int, int] | None) -> dict[str, Any]:
    """What the autoencoder is, for a report on images of (H, W), or of their own sizes."""
    factor = autoencoder.downsample_factor
    table = autoencoder.describe(factor)
    sides = [f"H/{factor}", f"W/{factor}"] if size is None else [-(-side // factor) for side in size]
    return table | {"latent_shape": [table["latent_shape"][0], *sides]}
