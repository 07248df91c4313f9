"""The picture at the head of README.md: originals, and their reconstructions by tokenizers that spend equal bits.

    python reconstructions.py IMAGES reconstructions.jpg NAME=TOKENIZER [NAME=TOKENIZER ...]

IMAGES: images that no tokenizer was trained on, in any form of --images; COUNT of them are taken at even intervals over
the set, before anything is measured. TOKENIZER: any that --tokenizer takes, such as those of `vqpipe demo`.
"""

import io
import math
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqpipe import Tokenizer, VqpipeError
from vqpipe.data import open_images
from vqpipe.data.decoding import decode
from vqpipe.data.transforms import center_crop
from vqpipe.errors import ConfigError
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.reports.pictures import GAP, side_by_side, to_png, with_labels

COUNT, SIDE = 4, 256
"""Images, and their side in pixels."""
COLUMNS = 6
"""Pictures per row: images with all their reconstructions, at least one."""


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
    per_row = max(1, COLUMNS // len(columns))
    rows = [side_by_side(*sets[start : start + per_row]) for start in range(0, len(sets), per_row)]
    gap = torch.full((3, GAP, rows[0].shape[2]), 255, dtype=torch.uint8)
    padded = [torch.nn.functional.pad(row, (0, gap.shape[2] - row.shape[2]), value=255) for row in rows]
    sheet = torch.cat([part for row in padded for part in (row, gap)][:-1], dim=1)
    return to_png(with_labels(sheet, labels * min(per_row, len(sets))))


def main(where: str, out: str, *named: str) -> None:
    opened = (each.partition("=") for each in named)
    tokenizers = {name: Tokenizer.from_pretrained(path, device="auto") for name, _, path in opened}
    found = open_images(where)
    chosen = np.linspace(0, len(found) - 1, COUNT).round().astype(int)
    images = [center_crop(decode(found[int(number)].image), SIDE) for number in chosen]
    Image.open(io.BytesIO(picture(images, tokenizers))).convert("RGB").save(out, quality=92)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except VqpipeError as error:
        sys.exit(f"error: {error}")
