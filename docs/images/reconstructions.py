"""The picture at the head of README.md: originals, and their reconstructions by two tokenizers that spend equal bits.

    python reconstructions.py IMAGES FC LC reconstructions.png [COUNT]

IMAGES: images that neither tokenizer was trained on, in any form of --images. FC, LC: two tokenizers, such as those of
`vqpipe demo`. COUNT images (default: 4) are taken at even intervals over the set, before anything is measured.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqpipe import Tokenizer, VqpipeError
from vqpipe.data import open_images
from vqpipe.data.decoding import decode
from vqpipe.data.transforms import center_crop
from vqpipe.errors import ConfigError
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.reports.pictures import GAP, side_by_side, to_png, with_labels

PER_ROW = 2
"""Images per row, each with its reconstructions."""


def bits_per_pixel(tokenizer: Tokenizer, size: int) -> float:
    """Bits of the ids of an image of `size` x `size` pixels, per pixel."""
    return tokenizer.layout(size, size).num_tokens * math.log2(tokenizer.codebook_size) / size**2


def picture(images: list[Tensor], tokenizers: dict[str, Tokenizer]) -> bytes:
    """A PNG of uint8[3, S, S] images beside their reconstructions, with the name, mean PSNR and bits of each tokenizer.

    Raises:
        ConfigError: the tokenizers spend different numbers of bits.
    """
    size = images[0].shape[-1]
    bits = {name: bits_per_pixel(tokenizer, size) for name, tokenizer in tokenizers.items()}
    if not math.isclose(min(bits.values()), max(bits.values())):
        listed = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
        raise ConfigError(f"the tokenizers spend different bits per pixel: {listed}", "Choose two with equal bits")
    originals, labels, columns = torch.stack(images), ["original"], [torch.stack(images)]
    for name, tokenizer in tokenizers.items():
        columns.append(tokenizer.decode(tokenizer.encode(originals), image_size=size).cpu())
        psnr = float(psnr_of(mean_squared_error(originals, columns[-1])).mean())
        labels.append(f"{name}, {psnr:.1f} dB")
    sets = [side_by_side(*each) for each in zip(*columns, strict=True)]
    rows = [side_by_side(*sets[start : start + PER_ROW]) for start in range(0, len(sets), PER_ROW)]
    gap = torch.full((3, GAP, rows[0].shape[2]), 255, dtype=torch.uint8)
    padded = [torch.nn.functional.pad(row, (0, gap.shape[2] - row.shape[2]), value=255) for row in rows]
    sheet = torch.cat([part for row in padded for part in (row, gap)][:-1], dim=1)
    return to_png(with_labels(sheet, labels * min(PER_ROW, len(sets))))


def main(where: str, fc: str, lc: str, out: str, count: str = "4") -> None:
    tokenizers = {name: Tokenizer.from_pretrained(path, device="auto") for name, path in (("FC", fc), ("LC", lc))}
    size = tokenizers["LC"].image_size or 256
    found = open_images(where)
    chosen = np.linspace(0, len(found) - 1, int(count)).round().astype(int)
    images = [center_crop(decode(found[int(number)].image), size) for number in chosen]
    Path(out).write_bytes(picture(images, tokenizers))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except VqpipeError as error:
        sys.exit(f"error: {error}")
