"""Make a trained `lc` tokenizer small: its codes already projected, its weights in float16.

    python pack.py TOKENIZER OUT

The 64-channel features of 16,384 codes would take as much space as half of the network; the projected codes have 8
channels. The search compares with the rounded codes, so a few ids differ from those of the trained tokenizer.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from vqpipe.models import build_autoencoder
from vqpipe.quantizers.lc import LcConfig
from vqpipe.tokenizer import Tokenizer


def pack(source: Path, out: Path) -> None:
    """Write the tokenizer of `source` into the folder `out`."""
    trained = Tokenizer.from_pretrained(source)
    quantizer = trained.config.quantizer
    assert isinstance(quantizer, LcConfig)
    projected = replace(quantizer, projector="none", feature_dim=quantizer.code_dim)
    autoencoder = build_autoencoder(replace(trained.config, quantizer=projected))
    tensors = trained.autoencoder.state_dict() | autoencoder.quantizer.state_dict(prefix="quantizer.")
    tensors["quantizer.codes"] = trained.codebook
    autoencoder.load_state_dict({name: tensors[name] for name in autoencoder.state_dict()})
    Tokenizer(autoencoder.to(torch.float16), image_size=trained.image_size).save_pretrained(out)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
