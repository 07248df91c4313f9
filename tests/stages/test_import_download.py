"""`vqpipe import-checkpoint` of what has to be downloaded first, from a server on loopback."""

import hashlib
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vqpipe import Tokenizer, zoo
from vqpipe.artifacts import open_artifact
from vqpipe.continuous import open_autoencoder

PAGE = "https://example.org/tokenizers"


@pytest.fixture(scope="module")
def checkpoint(golden: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VQGAN as taming-transformers would have saved it."""
    folder = tmp_path_factory.mktemp("released") / "taming"
    golden.make_checkpoint(folder)
    return folder / "last.ckpt"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def add_entry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., zoo.Entry]:
    """add_entry(name, files, ...): the only entry of the zoo."""

    def add_entry(name: str, *files: zoo.ZooFile, **values: Any) -> zoo.Entry:
        standard = {"title": name, "family": "taming", "paper": "A paper", "licence": "MIT", "page": PAGE}
        entry = zoo.Entry(name=name, files=files, **(standard | values))
        monkeypatch.setattr(zoo, "entries", lambda: (entry,))
        return entry

    return add_entry


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_entry_of_the_zoo_is_downloaded_checked_and_imported(
    hub_server: Any, checkpoint: Path, add_entry: Callable[..., Any], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    hub_server.files["last.ckpt"] = checkpoint.read_bytes()
    source = f"{hub_server.address}/files/last.ckpt"
    add_entry("small-vqgan", zoo.ZooFile(name="last.ckpt", source=source, sha256=sha256(checkpoint)))
    done = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--out", "imported")
    assert done.returncode == 0, done.stderr
    assert f"licence: MIT ({PAGE})" in done.stderr
    artifact = open_artifact(tmp_path / "imported", "tokenizer")
    assert {key: artifact.facts[key] for key in ("family", "zoo", "licence", "source")} == {
        "family": "taming",
        "zoo": "small-vqgan",
        "licence": "MIT",
        "source": source,
    }
    assert artifact.inputs == {"checkpoint": sha256(checkpoint)}
    assert "| licence | MIT |" in (tmp_path / "imported" / "README.md").read_text(encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path / "imported").codebook_size > 0
    assert hub_server.log == ["GET /files/last.ckpt"]

    shutil.rmtree(tmp_path / "cache")
    again = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--out", "imported")
    assert "already published" in again.stderr
    other = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--family", "ibq", "--out", "imported")
    assert "imported exists and was made with other settings" in other.stderr
    assert len(hub_server.log) == 1  # neither needed the file


@pytest.mark.parametrize(("known", "times"), [(True, 0), (False, 1)])
def test_large_file_is_hashed_no_more_than_needed(
    known: bool,
    times: int,
    checkpoint: Path,
    add_entry: Callable[..., Any],
    tmp_path: Path,
    vqpipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the hash is known, the check of the copy has hashed it already."""
    from stages import import_checkpoint

    hashed: list[Path] = []
    monkeypatch.setattr(import_checkpoint, "hash_file", lambda path: hashed.append(path) or sha256(path))
    add_entry("small-vqgan", zoo.ZooFile(name="last.ckpt", sha256=sha256(checkpoint) if known else ""))
    done = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--file", str(checkpoint), "--out", "imported")
    assert done.returncode == 0, done.stderr
    assert len(hashed) == times
    assert ("not checked: none is known for it" in done.stderr) == (not known)
    assert open_artifact(tmp_path / "imported", "tokenizer").inputs == {"checkpoint": sha256(checkpoint)}


def test_without_a_network_the_error_has_the_page_the_hash_and_a_command_that_works(
    checkpoint: Path, add_entry: Callable[..., Any], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    digest = sha256(checkpoint)
    add_entry("small-vqgan", zoo.ZooFile(name="last.ckpt", source="http://127.0.0.1:9/last.ckpt", sha256=digest))
    done = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--out", "imported")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: http://127.0.0.1:9/last.ckpt cannot be downloaded: Connection refused. Run `vqpipe import-checkpoint"
        f" small-vqgan --file last.ckpt --out imported` after downloading last.ckpt (sha256 {digest}) from {PAGE} in a"
        " browser.\n"
    )
    assert not list(tmp_path.glob("imported*"))
    (tmp_path / "last.ckpt").write_bytes(checkpoint.read_bytes())
    command = shlex.split(done.stderr.split("`")[1])
    done = vqpipe(tmp_path, *command[1:])
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(tmp_path / "imported", "tokenizer")
    assert (artifact.facts["zoo"], artifact.facts["source"]) == ("small-vqgan", PAGE)


def test_entry_that_only_a_browser_can_fetch(
    checkpoint: Path, add_entry: Callable[..., Any], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    add_entry("by-hand", zoo.ZooFile(name="last.ckpt"), licence=zoo.NOT_STATED)
    done = vqpipe(tmp_path, "import-checkpoint", "by-hand", "--out", "imported")
    assert done.stderr == (
        "error: by-hand cannot be downloaded by a program. Run `vqpipe import-checkpoint by-hand --file last.ckpt --out"
        f" imported` after downloading last.ckpt from {PAGE} in a browser.\n"
    )
    done = vqpipe(tmp_path, "import-checkpoint", "by-hand", "--file", str(checkpoint), "--out", "imported")
    assert done.returncode == 0, done.stderr
    assert f"last.ckpt: sha256 {sha256(checkpoint)}, not checked: none is known for it" in done.stderr
    assert f"licence: none stated at {PAGE}: ask its authors before you use or share it" in done.stderr
    assert open_artifact(tmp_path / "imported").inputs["checkpoint"] == sha256(checkpoint)


def test_own_file_with_another_hash_is_refused_and_kept(
    checkpoint: Path, add_entry: Callable[..., Any], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    add_entry("by-hand", zoo.ZooFile(name="last.ckpt", sha256="0" * 64, sha256_of="a copy"))
    done = vqpipe(tmp_path, "import-checkpoint", "by-hand", "--file", str(checkpoint), "--out", "imported")
    assert done.returncode == 1
    assert f"has sha256 {sha256(checkpoint)}; last.ckpt of by-hand has {'0' * 64} (read from a copy)" in done.stderr
    assert checkpoint.is_file()
    assert not list(tmp_path.glob("imported*"))


def test_url_is_imported_with_its_hash_and_address(
    hub_server: Any, checkpoint: Path, tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    hub_server.files["last.ckpt"] = checkpoint.read_bytes()
    url = f"{hub_server.address}/files/last.ckpt"
    done = vqpipe(tmp_path, "import-checkpoint", f"{url}?token=secret", "--out", "imported")
    assert done.returncode == 0, done.stderr
    assert f"sha256 {sha256(checkpoint)}, not checked: none is known for it" in done.stderr
    assert open_artifact(tmp_path / "imported").facts["source"] == url
    assert "secret" not in done.stderr + (tmp_path / "imported" / "manifest.json").read_text(encoding="utf-8")


def test_file_of_the_hub_is_imported_through_the_environment_of_huggingface_hub(
    hub_server: Any,
    hub_environment: dict[str, str],
    checkpoint: Path,
    tmp_path: Path,
    python: Any,
    processes: Any,
) -> None:
    hub_server.repositories["owner/name"] = {"last.ckpt": checkpoint.read_bytes()}
    words = ["import-checkpoint", "hf:owner/name/last.ckpt", "--out", "imported"]
    offline = python(processes.VQPIPE, *words, folder=tmp_path, environment=hub_environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1
    assert offline.stderr == (
        "error: hf:owner/name/last.ckpt is not in the cache and cannot be downloaded: HF_HUB_OFFLINE is set. Run "
        "`vqpipe import-checkpoint last.ckpt --out imported` after downloading the file from "
        "https://huggingface.co/owner/name in a browser.\n"
    )
    done = python(processes.VQPIPE, *words, folder=tmp_path, environment=hub_environment)
    assert done.returncode == 0, done.stderr
    source = open_artifact(tmp_path / "imported").facts["source"]
    assert source == "hf:owner/name/last.ckpt@c0ffee" + "0" * 34


def test_autoencoder_of_two_files_becomes_a_folder_for_eval(
    hub_server: Any, tiny_vae: Path, add_entry: Callable[..., Any], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    hub_server.files |= {name: (tiny_vae / name).read_bytes() for name in names}
    entry_files = [zoo.ZooFile(name=name, source=f"{hub_server.address}/files/{name}") for name in names]
    add_entry("small-vae", *entry_files, family="AutoencoderKL")
    done = vqpipe(tmp_path, "import-checkpoint", "small-vae", "--out", "vae")
    assert done.returncode == 0, done.stderr
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    opened = open_autoencoder(tmp_path / "vae")
    assert torch.equal(opened.encode(images), open_autoencoder(tiny_vae).encode(images))
    assert open_artifact(tmp_path / "vae", "autoencoder").facts["zoo"] == "small-vae"

    hub_server.files.clear()
    words = [word for name in names for word in ("--file", str(tiny_vae / name))]
    done = vqpipe(tmp_path, "import-checkpoint", "small-vae", *words, "--out", "by-hand")
    assert done.returncode == 0, done.stderr
    done = vqpipe(tmp_path, "import-checkpoint", "small-vae", *words[:2], "--out", "third")
    assert "error: 1 file for small-vae, which has 2. Pass config.json and diffusion_pytorch_model" in done.stderr


@pytest.mark.parametrize("entry", zoo.entries(), ids=lambda entry: entry.name)
def test_dry_run_of_every_entry_needs_no_network(
    entry: zoo.Entry, tmp_path: Path, vqpipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*words: Any, **options: Any) -> None:
        raise AssertionError(f"a connection to {words}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    done = vqpipe(tmp_path, "import-checkpoint", entry.name, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert entry.title in done.stdout
    assert f"licence: {entry.licence}" in done.stdout
    assert all(file.name in done.stdout and file.source in done.stdout for file in entry.files)
    assert ("cannot be imported" in done.stdout) == bool(entry.refused)
    assert not list(tmp_path.iterdir())


def test_wrong_words_are_one_line(
    add_entry: Callable[..., Any], checkpoint: Path, tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    add_entry("small-vqgan", refused="no importer")
    done = vqpipe(tmp_path, "import-checkpoint", "small-vqgam", "--out", "out")
    assert done.stderr == "error: small-vqgam is neither a file nor a name of vqpipe zoo. Did you mean small-vqgan?\n"
    done = vqpipe(tmp_path, "import-checkpoint", "small-vqgan", "--out", "out")
    assert done.stderr == f"error: small-vqgan cannot be imported: no importer. Its page is {PAGE}.\n"
    done = vqpipe(tmp_path, "import-checkpoint", "hf:owner/name", "--out", "out")
    assert "does not name a file of a repository. Write hf:OWNER/NAME/FILE" in done.stderr
    done = vqpipe(tmp_path, "import-checkpoint", str(checkpoint), "--file", str(checkpoint), "--out", "out")
    assert "is no name of vqpipe zoo" in done.stderr
    done = vqpipe(tmp_path, "import-checkpoint", str(checkpoint))
    assert done.returncode == 2
    add_entry("own-vqgan")
    for words in (["--family", "vqgam"], ["--file", "absent.pt"]):
        done = vqpipe(tmp_path, "import-checkpoint", "own-vqgan", *words, "--dry-run")
        assert (done.returncode, done.stdout) == (1, "")
    done = vqpipe(tmp_path, "import-checkpoint", "own-vqgan", "--file", str(checkpoint), "--dry-run")
    assert f"{checkpoint}: {checkpoint.stat().st_size:,} bytes, on this machine" in done.stdout
    add_entry("own-vae", family="AutoencoderKL")
    done = vqpipe(tmp_path, "import-checkpoint", "own-vae", "--family", "llamagen", "--out", "out")
    assert done.stderr == "error: own-vae is imported without --family and --codebook. Leave them out.\n"
    assert not list(tmp_path.glob("out*"))
