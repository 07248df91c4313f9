"""A network in Inception's shape with random weights, in the file format that people bring."""

from pathlib import Path

import pytest
import torch

from vqpipe.metrics.inception import INCEPTION_FILE


@pytest.fixture(scope="session")
def inception_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Inception's file, its weights random but scaled so that features differ between images."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # torch's own start shrinks with depth: all features would be 0
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / INCEPTION_FILE)
    return folder
