"""The networks of the study that vqpipe does not know, and random codebooks.

    python networks.py vqpipe COMMAND ...        run a command of vqpipe with the encoder `mobilenet` in its tables
    python networks.py codebook KIND K DIM FILE  a random codebook: normal, sphere, or drawn from a features artifact

The encoder `mobilenet:maps` gives the 96-channel maps of the middle of MobileNetV2, 14 x 14 at 224 px, for codebooks;
`mobilenet:pooled` its last 1,280-channel maps, whose mean is the feature of a Frechet distance (`eval --extractor`).
The weights are TensorFlow Lite's, dequantized, with folded batch norms, in a layout of their own: `stem.weight`,
`b0.dw.weight`, ..., `head.bias`. The distance carries this network's name, and is no FID.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cli import main
from vqpipe.codebooks.features import ENCODERS, EncoderKind, FeaturesConfig, open_features
from vqpipe.codebooks.pretrained import Normalized
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.weights import load_tensors

STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
"""(expansion, channels, blocks, stride of the first block) of MobileNetV2."""
MAPS_AFTER = 5
"""The stage that `mobilenet:maps` ends with."""
PREPROCESSING = {
    "size": 224,
    "mode": "RGB",
    "mean": (0.5, 0.5, 0.5),  # to [-1, 1]
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "crop_pct": 1.0,
}


class MobileNetV2(Normalized):
    """uint8[B, 3, 224, 224] -> float32[B, 96, 14, 14], or float32[B, 1280, 7, 7] for "pooled"."""

    def __init__(self, weights: Path, output: str) -> None:
        super().__init__(224, PREPROCESSING)
        self.output = output
        for name, tensor in load_tensors(weights).items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        if not hasattr(self, "stem_weight"):
            raise WeightsError(f"{weights} is not the study's MobileNetV2", "See the README of the weights")
        self.measure()

    def convolve(self, x: Tensor, name: str, stride: int = 1, depthwise: bool = False) -> Tensor:
        """A convolution with TensorFlow's SAME padding."""
        name = name.replace(".", "_")
        weight, bias = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")
        if weight.shape[-1] > 1:
            total = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, weight, bias, stride, groups=x.shape[1] if depthwise else 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.convolve(self.normalize(images), "stem", 2))
        block = 0
        for number, (expansion, _, count, stride) in enumerate(STAGES, start=1):
            for index in range(count):
                before = x
                if expansion > 1:
                    x = F.relu6(self.convolve(x, f"b{block}.exp"))
                x = F.relu6(self.convolve(x, f"b{block}.dw", 1 if index else stride, depthwise=True))
                x = self.convolve(x, f"b{block}.proj")
                x = x + before if index else x
                block += 1
            if number == MAPS_AFTER and self.output == "maps":
                return x
        return F.relu6(self.convolve(x, "head"))


def build(config: FeaturesConfig, name: str, weights: Path | None) -> MobileNetV2:
    """The encoder `mobilenet:NAME`."""
    if weights is None or name not in ("maps", "pooled"):
        raise ConfigError(f"mobilenet:{name} cannot be built", "Use maps or pooled, and name the file of its weights")
    return MobileNetV2(weights, name)


def random_codebook(kind: str, size: int, dim: int, file: Path) -> None:
    """Write float32[size, dim]: standard normal vectors, for "sphere" scaled to unit length. Any other `kind` is a
    features artifact: distinct vectors of it, as with `kmeans.select=random`, but without the pass that counts their
    neighbors. A file that is there is left as it is."""
    if file.exists():
        return
    generator = np.random.default_rng(0)
    if kind in ("normal", "sphere"):
        codes = generator.standard_normal((size, dim), np.float32)
        if kind == "sphere":
            codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    else:
        features = open_features([kind])
        everything = features.take(np.arange(features.num_vectors)).numpy()
        first = np.unique(everything.view(f"V{everything.strides[0]}"), return_index=True)[1]
        codes = everything[np.sort(generator.choice(first, size, replace=False))]
    np.save(file, codes)


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    if action == "codebook":
        random_codebook(arguments[0], int(arguments[1]), int(arguments[2]), Path(arguments[3]))
    else:
        torch.set_num_threads(1)
        ENCODERS["mobilenet"] = EncoderKind("mobilenet:maps|pooled", build, lambda name: ("", ()))
        sys.argv = ["vqpipe", *arguments]
        main()
