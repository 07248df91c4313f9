"""What every test may use, and which warnings are errors."""

import io
import os
import sys
import tarfile
import warnings
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from vqpipe.quantizers import QuantizerConfig
    from vqpipe.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("vqpipe", "stages", "tests"))
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
warn = warnings.warn


def warn_strictly(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **options: Any) -> None:
    """`warnings.warn`, except that a deprecation raised by a file of this project is an error.

    A filter cannot tell who raises a warning: libraries name their caller by `stacklevel`, and that is often us.
    """
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DEPRECATIONS) and sys._getframe(1).f_code.co_filename.startswith(OURS):
        raise message if isinstance(message, Warning) else kind(message)
    warn(message, category, stacklevel + 1, *args, **options)


def pytest_configure() -> None:
    warnings.warn = warn_strictly  # type: ignore[assignment]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread a test process: the suite runs one process per core, and results do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of photographs and pretrained weights that stands beside some checkouts; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of photographs and weights beside this checkout")
    return folder


@pytest.fixture(scope="session")
def parity_outputs() -> Path:
    """The outputs of the released code; tests/parity/outputs/README.md describes them."""
    return ROOT / "tests" / "parity" / "outputs"


@pytest.fixture(scope="session")
def small_tokenizer() -> "Callable[[QuantizerConfig], Tokenizer]":
    """small_tokenizer(quantizer): a whitened tokenizer with f = 4 for images of 32 pixels."""
    from vqpipe.models import VqganConfig, build_autoencoder
    from vqpipe.tokenizer import Tokenizer

    def make(quantizer: "QuantizerConfig") -> Tokenizer:
        torch.manual_seed(0)
        config = VqganConfig(
            base_channels=8,
            channel_multipliers=(1, 2),
            patch_size=2,
            num_res_blocks=1,
            attention_resolutions=(),
            z_channels=8,
            quantizer=quantizer,
        )
        autoencoder = build_autoencoder(config)
        autoencoder.whiten_init(torch.rand(16, 3, 32, 32) * 2 - 1)
        return Tokenizer(autoencoder, image_size=32)

    return make


@pytest.fixture(scope="session")
def crash() -> ModuleType:
    """The module tests/faults/crash.py, which kills a process at its n-th file operation."""
    spec = spec_from_file_location("crash", ROOT / "tests" / "faults" / "crash.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pack() -> Callable[..., bytes]:
    """pack({"a.png": bytes, ...}) -> the bytes of a tar."""

    def pack(members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return pack
