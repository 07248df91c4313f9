"""Evaluation protocols: named choices of everything that moves the numbers of a given network.

Crop, rounding, resize and formula move numbers by decibels, so each number is reported with the name of its protocol,
and numbers of two protocols never share a column. A protocol fixes:

    crop        from an image to the network's input
    reference   the other set of the Frechet distance: the same crops, or the raw images
    rounding    from a reconstruction to 8-bit pixels
    resize      from 8-bit pixels to Inception's 299 x 299
    conventions the PSNR, SSIM and LPIPS that its authors report (keys of `distortion.CONVENTIONS`)

Pixels stay in memory in every protocol, which equals PNG files; no reconstruction is stored as JPEG. Originals may be
JPEG files, as ImageNet's are: they are compared as decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from vqpipe.errors import DataError, NumericError
from vqpipe.metrics.distortion import CONVENTIONS

Name = Literal["adm", "cleanfid-matched", "cleanfid-rawval"]
Rounding = Literal["round", "truncate"]

CROPS = {
    "adm": "halved by box averaging while the short side is at least twice the size, then PIL bicubic, center",
    "cover": "PIL bicubic until both sides cover the size, center",
    "linear": "short side to the size by bilinear interpolation without antialiasing, center",
    "native": "whole images at their own size",
}
"""Crop rule -> description."""
REFERENCES = {"crops": "the same crops", "raw": "the raw images, uncropped, squeezed to 299 x 299"}
ROUNDINGS = {"round": "clamped and rounded to uint8", "truncate": "clamped and truncated to uint8"}
RESIZES = {
    "tf1": "bilinear as in TensorFlow 1, inside the network (torch-fidelity)",
    "clean": "PIL bicubic of each channel as float32, clipped, not rounded again (clean-fid, mode clean)",
}
EXTRACTOR = "Inception-v3 of 2015, last pooling, 2,048 features (torch-fidelity's conversion)"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One evaluation protocol."""

    name: Name
    crop: Literal["adm", "cover", "linear"]
    """Rule of the crop at one square size; see `crop_rule` for other sizes."""
    reference: Literal["crops", "raw"]
    rounding: Rounding
    resize: Literal["tf1", "clean"]
    psnr: str
    ssim: str
    lpips: str

    def crop_rule(self, size: tuple[int, int] | None) -> Literal["adm", "cover", "linear", "native"]:
        """The crop to (H, W); None: images keep their own sizes.

        ADM's and VQGAN-LC's rules are for squares. Other sizes are cropped as MGVQ crops its 2560 x 1440 images.
        """
        if size is None:
            return "native"
        return self.crop if size[0] == size[1] else "cover"

    def to_table(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """Its choices in words, for `metrics.json`."""
        rule = self.crop_rule(size)
        return {
            "crop": f"{rule}: {CROPS[rule]}",
            "reference": REFERENCES["crops" if rule == "native" else self.reference],
            "rounding": ROUNDINGS[self.rounding],
            "resize": RESIZES[self.resize],
            "extractor": EXTRACTOR,
            "conventions": {
                name: f"{key}: {CONVENTIONS[key]}"
                for name, key in (("psnr", self.psnr), ("ssim", self.ssim), ("lpips", self.lpips))
            },
        }


ADM = Protocol(
    name="adm",
    crop="adm",
    reference="crops",
    rounding="round",
    resize="tf1",
    psnr="psnr",
    ssim="ssim",
    lpips="lpips_alex",
)
"""rFID in the manner of ADM (Dhariwal & Nichol 2021), as most tokenizers report it: LlamaGen's rows, for one.

Evidence: guided-diffusion's `center_crop_arr` and `evaluations/evaluator.py`. Different here: the TensorFlow graph is
replaced by torch-fidelity's conversion of its weights and of its resize, so that no TensorFlow is needed; LlamaGen
truncates to uint8, here values are rounded, which is nearer to the reconstruction. The ADM suite has neither PSNR nor
SSIM nor LPIPS: those named are the common ones.
"""

CLEANFID_MATCHED = Protocol(
    name="cleanfid-matched",
    crop="cover",
    reference="crops",
    rounding="truncate",
    resize="clean",
    psnr="psnr_of_mean_mse_float",
    ssim="ssim_uniform7",
    lpips="lpips_vgg",
)
"""MGVQ (Jia et al. 2025), Tables 1 to 3: clean-fid between crops and reconstructions, both stored as PNG.

Evidence: its released `evaluation/eval_recon.py` and `eval_aug.py`. PSNR is that of the mean error over the set, on
values that are not rounded; SSIM is scikit-image's default on uint8. Different here:
- their LPIPS builds VGG16 without its weights, feeds it [0, 1] and leaves dropout on, so its values cannot be
  reproduced; here it is LPIPS-VGG as published, on the rounded pixels;
- their crops pass through float32 before they are truncated to uint8, which may take a level from some pixels; here the
  reference is the crop itself;
- Inception's weights are torch-fidelity's conversion, not clean-fid's TorchScript file.
"""

CLEANFID_RAWVAL = Protocol(
    name="cleanfid-rawval",
    crop="linear",
    reference="raw",
    rounding="truncate",
    resize="clean",
    psnr="psnr_y_float",
    ssim="ssim_float",
    lpips="lpips_alex",
)
"""VQGAN-LC (Zhu et al. 2024), Table 2: clean-fid between reconstructions and the folder of raw validation images.

Evidence: its released `eval_reconstruction.py`. The raw images are not cropped, so clean-fid squeezes them to squares,
the aspect ratio lost, and the distance holds that difference too. PSNR is of BT.601 studio luma against a peak of 1
(pyiqa); SSIM is piq's, Gaussian, on clamped values that are not rounded. Different here:
- their LPIPS (pyiqa's, which maps [0, 1] to [-1, 1]) is fed [-1, 1] that is not clamped, so the network sees [-3, 1];
  here it is LPIPS-Alex as published, on the rounded pixels;
- pyiqa adds 1e-8 to the error under the logarithm; here nothing;
- piq downsamples images with sides above about 256 pixels by averaging; here never;
- Inception's weights as above.
"""

IN_WORDS = {
    "adm": "ADM's crop and rFID",
    "cleanfid-matched": "clean-fid between crops and reconstructions, as MGVQ",
    "cleanfid-rawval": "clean-fid against whole images, as VQGAN-LC",
    "cleanfid-raw": "clean-fid against whole images",
}
"""Protocol of a tokenizer or of samples -> what it is, for readers of a page."""


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({p.name: p for p in (ADM, CLEANFID_MATCHED, CLEANFID_RAWVAL)})


def gray_levels(images: Tensor) -> Tensor:
    """float[B, 3, H, W] in [-1, 1], or uint8 -> float32 in [0, 255], clamped, not rounded.

    Raises:
        DataError: another type.
        NumericError: NaN or infinity.
    """
    if images.dtype == torch.uint8:
        return images.float()
    if not images.is_floating_point():
        raise DataError(f"reconstructions are uint8 or float in [-1, 1], got {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise NumericError("a reconstruction holds NaN or infinity", "Check the weights and the images")
    return ((images.float() + 1.0) * 127.5).clamp(0, 255)


def stored(levels: Tensor, rounding: Rounding) -> Tensor:
    """float in [0, 255] -> uint8, as a protocol stores pixels."""
    return (levels.round() if rounding == "round" else levels).to(torch.uint8)
