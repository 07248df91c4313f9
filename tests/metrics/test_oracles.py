"""All metrics against torch-fidelity on random weights, and a distance over a real network that must rank JPEGs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.transforms import pixels
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.metrics import EvalConfig
from vqpipe.metrics.feature_networks import FeatureNetworks, find_networks
from vqpipe.metrics.inception import INCEPTION_FILE

CPU = torch.device("cpu")
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
"""MobileNetV2 (Sandler et al. 2018, Table 2): expansion, channels, blocks, first stride."""


def photographs(n: int, size: int) -> Tensor:
    """uint8[n, 3, size, size]: smooth random images."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.slow
def test_fid_equals_torch_fidelity_on_the_same_images_and_random_weights(inception_folder: Path) -> None:
    from torch.utils.data import TensorDataset
    from torch_fidelity import calculate_metrics

    class Images(TensorDataset):
        def __getitem__(self, i: int) -> Tensor:  # type: ignore[override]
            return super().__getitem__(i)[0]

    originals = photographs(24, 96)
    noise = torch.randint(-30, 31, originals.shape, generator=torch.Generator().manual_seed(1))
    again = (originals.int() + noise).clamp(0, 255).to(torch.uint8)
    config = EvalConfig(image_size=96, fid_min_images=2, metrics=("prc",), prefixes=False)
    measured = EvaluationMetrics(config, find_networks(inception_folder), None, 0, CPU)
    for part in (slice(0, 5), slice(5, 24)):
        measured.update(originals[part], again[part], None)
    expected = calculate_metrics(
        input1=Images(again),
        input2=Images(originals),
        fid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        cuda=False,
        batch_size=8,
        feature_extractor_weights_path=str(inception_folder / INCEPTION_FILE),
        cache=False,
        save_cpu_ram=True,  # no loader processes
        verbose=False,
    )
    own = measured.compute()[0]["protocols"]["adm"]
    assert own["rfid"] == pytest.approx(expected["frechet_inception_distance"], abs=1e-3)
    assert own["rfid"] > 0.01
    assert own["prc"]["precision"] == pytest.approx(expected["precision"])


class MobileNetV2(nn.Module):
    """Pooled features, float32[B, 1280], of uint8[B, 3, H, W]; batch norm folded, padding as TensorFlow's SAME."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.tensors = {name: t.float() for name, t in torch.load(weights, weights_only=True).items()}

    def convolve(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        if weight.shape[-1] == 3:
            missing = max((-(-x.shape[-1] // stride) - 1) * stride + 3 - x.shape[-1], 0)
            x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        return F.conv2d(x, weight, bias, stride, groups=groups)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", antialias=True)
        x, number = F.relu6(self.convolve(x / 127.5 - 1, "stem", 2)), 0
        for expansion, _, blocks, first_stride in STAGES:
            for block in range(blocks):
                y = F.relu6(self.convolve(x, f"b{number}.exp")) if expansion > 1 else x
                stride = first_stride if block == 0 else 1
                y = F.relu6(self.convolve(y, f"b{number}.dw", stride, groups=y.shape[1]))
                y = self.convolve(y, f"b{number}.proj")
                x, number = x + y if block else y, number + 1
        return F.relu6(self.convolve(x, "head")).mean((2, 3))


def as_jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=quality)
    return pixels(decode(buffer.getvalue()))


@pytest.mark.slow
@pytest.mark.weights
def test_distance_over_a_real_network_falls_with_jpeg_quality_and_is_zero_for_equal_images(shared: Path) -> None:
    weights = shared / "weights" / "mobilenet_v2_tflite_dequant_fp16.pth"
    tars = sorted((shared / "data" / "eval").glob("*.tar"))
    if not weights.is_file() or not tars:
        pytest.skip("no MobileNetV2 or no photographs beside this checkout")
    originals = torch.stack([pixels(decode(sample.image)) for sample in open_images(tars)[:60]])
    config = EvalConfig(image_size=256, fid_min_images=50, prefixes=False)
    networks = FeatureNetworks({}, None, {}, {"rfid": "no weights"}, {"mobilenet_v2": MobileNetV2(weights)})
    distances = []
    for quality in (8, 20, 50, None):
        again = originals if quality is None else torch.stack([as_jpeg(image, quality) for image in originals])
        measured = EvaluationMetrics(config, networks, None, 0, CPU)
        for part, its_part in zip(originals.split(16), again.split(16), strict=True):
            measured.update(part, its_part, None)
        metrics = measured.compute()[0]
        assert metrics["rfid"] == {}
        assert metrics["frechet"].keys() == {"mobilenet_v2"}
        distances.append(metrics["frechet"]["mobilenet_v2"])
    assert distances[0] > distances[1] > distances[2] > 10 > 1e-3 > distances[3]
