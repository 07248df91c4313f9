"""What every test may use, and which warnings are errors."""

import contextlib
import gc
import importlib
import inspect
import io
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

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
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but not looked for among the modules and tests, which stay to the end."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's bindings count what is left


@pytest.fixture(scope="session", autouse=True)
def _warnings_stay_on() -> Iterator[None]:
    """Commands that run in this process leave its warnings as they are: errors."""
    from stages import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "silence_libraries", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread a test process: the suite runs one process per core, and results do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_flush() -> Iterator[None]:
    """Files of this process are not flushed to the disk, which takes more time than to write them.

    tests/faults/test_disk.py and tests/artifacts/test_states.py replace `os.fsync` themselves: its order, its failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def quick_training() -> Callable[[pytest.MonkeyPatch], None]:
    """`quick_training(patch)`: the FLOPs of a training run are not counted, and its plots are not drawn: each takes a
    third of the time of a short run.

    tests/training/test_throughput.py counts them, tests/reports draws the plots, and a run of the fixture `folder` of
    tests/stages/test_pipeline.py does both.
    """
    from vqpipe.reports import plots
    from vqpipe.training import tokenizer_run
    from vqpipe.training.throughput import FlopsPerImage

    def quick_training(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(plots, "one_axes", lambda names: (MagicMock(), MagicMock()))
        patch.setattr(plots, "to_svg", lambda figure, salt: "<svg></svg>")
        patch.setattr(tokenizer_run, "count_flops", lambda *arguments: FlopsPerImage(1e9, 1e8))

    return quick_training


@pytest.fixture
def fast_training(quick_training: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`quick_training` for a test."""
    quick_training(monkeypatch)


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


@contextlib.contextmanager
def no_initialization() -> Iterator[None]:
    """Networks are made without random numbers: their weights are whatever is in memory, and codes any vectors."""
    from vqpipe.quantizers.base import CodebookQuantizer

    with pytest.MonkeyPatch.context() as patch:
        for layer in (torch.nn.Conv2d, torch.nn.Linear):
            patch.setattr(layer, "reset_parameters", lambda self: None)
        for name in ("normal_", "kaiming_normal_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *arguments, **options: tensor)
        patch.setattr(CodebookQuantizer, "maybe_normalize", lambda self, vectors, dim=-1: vectors)
        yield


@pytest.fixture(scope="session")
def uninitialized() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """uninitialized(): a context to make a network in that is filled afterwards, or is on the meta device."""
    return no_initialization


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


@dataclass
class Hub:
    """A model hub in place of Hugging Face's, with an empty cache. Its files are those of `files`, by name."""

    files: dict[str, Path] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """What was asked of it: "USER/NAME" for a whole repository, "USER/NAME/FILE" for a file."""
    online: bool = True

    def hf_hub_download(self, repository: str, name: str, **options: Any) -> str:
        self.requests.append(f"{repository}/{name}")
        if name not in self.files:
            raise FileNotFoundError(f"no {name} here")
        return str(self.files[name])

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self.requests.append(repository)
        return str(self.files[repository])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub that encoders and tokenizers are fetched from; nothing else has a network."""
    import huggingface_hub

    from vqpipe import downloads

    def look_up(host: Any, *port: Any, **options: Any) -> None:
        raise AssertionError(f"a connection to {host!r}")

    fake = Hub()
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(downloads.hub, "reachable", lambda url: fake.online)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return fake


def load_module(path: Path) -> ModuleType:
    """A file of tests as a module."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up the module of their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def crash() -> ModuleType:
    """The module tests/faults/crash.py, which kills a process at its n-th file operation."""
    return load_module(ROOT / "tests" / "faults" / "crash.py")


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module tests/golden.py, which makes pictures, and random weights in the formats of their publishers."""
    return load_module(ROOT / "tests" / "golden.py")


@pytest.fixture
def hub_server() -> Iterator[Any]:
    """A running `Server` of tests/hub_server.py."""
    module = sys.modules.get("hub_server") or load_module(ROOT / "tests" / "hub_server.py")
    with module.running() as server:
        yield server


@pytest.fixture
def hub_in_process(hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub_server` as the hub of this process, with an empty cache and a token."""
    from huggingface_hub import constants

    template = hub_server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", sys.modules["hub_server"].TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub_server


@pytest.fixture
def hub_environment(hub_server: Any, tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose hub is `hub_server`, with empty caches."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "XDG_CACHE"))}
    return kept | {
        "HF_ENDPOINT": hub_server.address,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",  # the other protocol of large files needs a server of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def draw_folder() -> Callable[..., Path]:
    """`draw_folder(folder, count, side=20)`: a new folder of smooth drawn pictures, 00.png, 01.png, ..."""

    def draw_folder(folder: Path, count: int, side: int = 20) -> Path:
        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        return folder

    return draw_folder


@pytest.fixture(scope="session")
def processes() -> Any:
    """The module tests/processes.py, which other processes import too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests")
        yield importlib.import_module("processes")


@pytest.fixture(scope="session")
def forkserver(processes: Any) -> Any:
    """A context of multiprocessing whose processes are forked from one that has imported torch, and no test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.IMPORTED)
    return context


@pytest.fixture(scope="session")
def start_process(forkserver: Any, processes: Any) -> Callable[..., Any]:
    """`start_process(function, *arguments)`: a started process that calls a function of a test's file."""

    def start_process(function: Callable[..., Any], *arguments: Any) -> Any:
        process = forkserver.Process(
            target=processes.call, args=(inspect.getfile(function), function.__name__, *arguments)
        )
        process.start()
        return process

    return start_process


@pytest.fixture(scope="session")
def on_two_ranks(forkserver: Any, processes: Any) -> Callable[..., list[Any]]:
    """`on_two_ranks(function, *arguments)`: what a function of a test's file returns on each of two ranks."""

    def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        call = (inspect.getfile(function), function.__name__, *arguments)
        with ProcessPoolExecutor(2, forkserver) as pool:
            ranks = [pool.submit(processes.call_as_rank, rank, 2, port, *call) for rank in range(2)]
            return [rank.result(timeout=300) for rank in ranks]

    return on_two_ranks


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def vqpipe() -> Callable[..., Done]:
    """`vqpipe(folder, *words)` runs the console script in this process, so that torch is imported once."""
    from stages import cli, signals

    def run(folder: Path, *words: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["vqpipe", *words])
            before = {number: signal.getsignal(number) for number in signals.SIGNALS}
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        return Done(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def python(start_process: Callable[..., Any], processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`python(code, *words, folder=..., environment=...)`: how `python -c CODE WORDS` ends, without its start: it is a
    process that has imported torch already."""

    def python(code: str, *words: str, folder: Path = ROOT, environment: Mapping[str, str] = os.environ) -> Done:
        output = tmp_path_factory.mktemp("python") / "printed"
        process = start_process(processes.program, code, words, folder, dict(environment), output)
        process.join()
        printed = (output.with_suffix(kind).read_text(encoding="utf-8") for kind in (".out", ".err"))
        return Done(process.exitcode, *printed)

    return python


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
