"""From an image file to what protocols measure: its crops, and their reconstructions, whole or in tiles.

Shapes: B images of H x W pixels, N ids of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from vqpipe.continuous import ImageAutoencoder
from vqpipe.data.transforms import Framing, pixels
from vqpipe.metrics.inception import INCEPTION_SIZE, clean_resize
from vqpipe.metrics.resumable import Resumable
from vqpipe.tiling import OVERLAP, mirrored, reconstruct_any_size


class PackedCrops:
    """The crops of an image that protocols need, as one tensor of bytes, which a loader process can send.

    Args:
        rules: crop rules; each gives uint8[3, H, W].
        size: (H, W); None for whole images, which have one rule.
        raw: whether to add the uncropped image in clean-fid's resize, float32[3, 299, 299].
    """

    def __init__(self, rules: Sequence[str], size: tuple[int, int] | None, raw: bool) -> None:
        self.framings = {rule: Framing(rule=rule, size=size) for rule in dict.fromkeys(rules)}  # type: ignore[arg-type]
        self.size, self.raw = size, raw

    def __call__(self, image: Image.Image) -> Tensor:
        crops = [framing(image) for framing in self.framings.values()]
        if self.size is None:
            return crops[0]
        raw = [clean_resize(pixels(image)).view(torch.uint8)] if self.raw else []
        return torch.cat([part.flatten() for part in (*crops, *raw)])

    def split(self, packed: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """A batch of packed crops -> uint8[B, 3, H, W] by rule, and the raw images, float32[B, 3, 299, 299]."""
        if self.size is None:
            return {next(iter(self.framings)): packed}, None
        length = 3 * self.size[0] * self.size[1]
        crops = {
            rule: packed[:, i * length : (i + 1) * length].reshape(-1, 3, *self.size)
            for i, rule in enumerate(self.framings)
        }
        if not self.raw:
            return crops, None
        raw = packed[:, len(self.framings) * length :].contiguous().view(torch.float32)
        return crops, raw.view(-1, 3, INCEPTION_SIZE, INCEPTION_SIZE)


@dataclass(frozen=True)
class ReconstructedBatch:
    """A batch of reconstructed images."""

    images: Tensor
    """float[B, 3, H, W] of about [-1, 1]; each protocol rounds in its own way."""
    ids: Tensor | None
    """int64[B, N], those of tiles one after another; None for continuous latents."""
    prefixes: dict[int, Tensor]
    """k -> the images decoded from the first k groups alone."""


class Reconstructor(Resumable):
    """Reconstructs images, and counts those that are padded or tiled.

    Args:
        tile: images with a longer side are reconstructed in tiles of this side, pixels; None: never.
    """

    state_names: ClassVar[tuple[str, ...]] = ("num_padded", "num_tiled")

    def __init__(self, autoencoder: ImageAutoencoder, tile: int | None) -> None:
        self.autoencoder, self.tile = autoencoder, tile
        self.num_padded = self.num_tiled = 0

    def count(self, originals: Tensor) -> None:
        """Count images that are tiled or padded, [B, 3, H, W]."""
        if self.needs_tiles(originals):
            self.num_tiled += len(originals)
        elif any(side % self.autoencoder.downsample_factor for side in originals.shape[-2:]):
            self.num_padded += len(originals)

    def needs_tiles(self, originals: Tensor) -> bool:
        return self.tile is not None and max(originals.shape[-2:]) > self.tile

    def __call__(self, originals: Tensor, prefixes: Sequence[int] = ()) -> ReconstructedBatch:
        """uint8[B, 3, H, W] -> reconstructions, from all groups and from the first k of `prefixes`."""
        if self.needs_tiles(originals):
            return self.in_tiles(originals, prefixes)
        height, width = originals.shape[-2:]
        factor, autoencoder = self.autoencoder.downsample_factor, self.autoencoder
        padded, size = originals, (height, width)
        if height % factor or width % factor:
            rows, columns = mirrored(height, factor), mirrored(width, factor)
            padded, size = originals[..., rows[:, None], columns], (len(rows), len(columns))
        code = autoencoder.encode(padded)
        images, *others = (
            autoencoder.decode_float(code, size, groups=k)[..., :height, :width] for k in (None, *prefixes)
        )
        ids = None if autoencoder.codebook_size is None else code
        return ReconstructedBatch(images, ids, dict(zip(prefixes, others, strict=True)))

    def in_tiles(self, originals: Tensor, prefixes: Sequence[int]) -> ReconstructedBatch:
        """uint8[1, 3, H, W], tile by tile."""
        assert self.tile is not None
        device, overlap = originals.device, min(OVERLAP, self.tile // 8)
        image = originals[0].cpu()
        tiled = [
            reconstruct_any_size(self.autoencoder, image, groups=k, tile=self.tile, overlap=overlap, rounded=False)
            for k in (None, *prefixes)
        ]
        ids = None if tiled[0].ids is None else torch.cat(tiled[0].ids)[None].to(device)
        images, *others = (part.image[None].to(device) for part in tiled)
        return ReconstructedBatch(images, ids, dict(zip(prefixes, others, strict=True)))

    def counts(self) -> dict[str, Any]:
        """For `metrics.json`: how many images were padded or tiled over all ranks, and what that means."""
        merged, found = self.merged(), dict[str, Any]()
        if merged.num_padded:
            how = f"mirrored to multiples of {self.autoencoder.downsample_factor} pixels, and cropped back"
            found["padded"] = {"num_images": merged.num_padded, "how": how}
        if merged.num_tiled:
            how = "overlapping tiles, blended before rounding; tokens of overlaps count each time"
            found["tiles"] = {"num_images": merged.num_tiled, "side": self.tile, "how": how}
        return found
