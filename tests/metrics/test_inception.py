"""Inception against torch-fidelity's own forward, with weights from a file of the test."""

from pathlib import Path

import pytest
import torch

from vqpipe.errors import WeightsError
from vqpipe.metrics.inception import INCEPTION_FILE, SIZES, Inception, resize_tf1


def test_outputs_equal_torch_fidelity(inception_folder: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = inception_folder / INCEPTION_FILE
    library = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    images = torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, spatial = Inception(file), []
    hook = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[2]))
    found = network(images, ("pool", "logits", "spatial"))
    hook.remove()
    pool, logits = library(images)
    assert torch.equal(found["pool"], pool)
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found["spatial"], spatial[-1][:, :7].flatten(1))
    assert {name: features.shape[1] for name, features in found.items()} == SIZES
    torch.testing.assert_close(network(resize_tf1(images))["pool"], pool)


def test_a_file_of_other_weights_raises(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(WeightsError, match="does not fit FID's Inception"):
        Inception(other)
    (tmp_path / "text.pth").write_text("<html>not found</html>", encoding="utf-8")
    with pytest.raises(WeightsError):
        Inception(tmp_path / "text.pth")
