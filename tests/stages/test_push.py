"""`vqpipe push` and `Tokenizer.push_to_hub`: the upload to a hub on loopback, and the model card."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stages.evaluate import evaluate
from vqpipe import Tokenizer
from vqpipe.errors import ConfigError, WeightsError

FILES = {"README.md", "config.json", "model.safetensors"}


def head(card: str) -> dict[str, Any]:
    """The YAML head of a model card."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def test_pushed_tokenizer_opens_by_its_name_and_gives_the_same_ids(
    hub_in_process: Any, tiny_tokenizer: Callable[..., Path], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    path = tiny_tokenizer("mine")
    done = vqpipe(tmp_path, "push", "mine", "hf:owner/mine", "--license", "Apache-2.0", "--dataset", "owner/photos")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub_in_process.address}/owner/mine")
    assert "next: vqpipe eval --tokenizer hf:owner/mine --images builtin:photos --out report\n" in done.stderr
    stored = hub_in_process.repositories["owner/mine"]
    assert stored.keys() - {".gitattributes"} == FILES
    card = stored["README.md"].decode()
    assert head(card) == {
        "library_name": "vqpipe",
        "tags": ["image-tokenizer", "vector-quantization", "image-reconstruction"],
        "license": "apache-2.0",
        "datasets": ["owner/photos"],
    }
    for part in ('from_pretrained("hf:owner/mine")', "--tokenizer hf:owner/mine --out", "## Limits", "## Lineage"):
        assert part in card

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = Tokenizer.from_pretrained(path).encode(images)
    for source in ("hf:owner/mine", Path("hf:owner/mine"), "hf:owner/mine@v1"):
        opened = Tokenizer.from_pretrained(source)
        assert opened.name == "mine"
        assert torch.equal(opened.encode(images), ids)
    hub_in_process.log.clear()
    assert torch.equal(Tokenizer.from_pretrained("owner/mine", revision="v1").encode(images), ids)
    assert all("/v1" in line for line in hub_in_process.log if "/revision/" in line)


def test_card_has_the_numbers_of_the_report_with_their_protocol(
    hub_in_process: Any,
    tiny_tokenizer: Callable[..., Path],
    picture_folder: Path,
    tmp_path: Path,
    vqpipe: Callable[..., Any],
) -> None:
    tiny_tokenizer("mine")
    evaluate([str(picture_folder)], tmp_path / "mine", tmp_path / "report", image_size=32, device="cpu")
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--report", "report", "--dry-run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert "Protocol `adm`: 10 images of 32 px, pictures" in done.stdout
    assert f"| PSNR | {metrics['psnr']:.2f} dB |" in done.stdout
    assert "- rFID: " in done.stdout  # not computed, with its reason
    assert "model.safetensors: " in done.stderr
    assert hub_in_process.log == []  # a dry run uploads nothing

    tiny_tokenizer("other", seed=1)
    done = vqpipe(tmp_path, "push", "other", "owner/other", "--report", "report")
    assert done.returncode == 1
    assert "report measures tokenizer" in done.stderr
    assert "Run vqpipe eval with this tokenizer" in done.stderr
    assert hub_in_process.log == []


def test_private_repository_and_second_push(
    hub_in_process: Any, tiny_tokenizer: Callable[..., Path], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    tiny_tokenizer("mine")
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--private")
    assert done.returncode == 0, done.stderr
    assert "the card states no licence" in done.stderr
    asked = hub_in_process.created[0]
    assert asked.get("visibility", asked.get("private")) in ("private", True)
    assert "license" not in head(hub_in_process.repositories["owner/mine"]["README.md"].decode())
    assert vqpipe(tmp_path, "push", "mine", "owner/mine", "--licence", "my own").returncode == 0
    card = hub_in_process.repositories["owner/mine"]["README.md"].decode()
    assert {key: value for key, value in head(card).items() if "lic" in key} == {
        "license": "other",
        "license_name": "my own",
    }


def test_private_weights_are_not_pushed_to_a_public_repository(
    hub_in_process: Any, tiny_tokenizer: Callable[..., Path], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    tiny_tokenizer("mine")
    hub_in_process.repositories["owner/mine"] = {}
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--private")
    assert done.stderr == (
        "the card states no licence: pass --licence to state one\n"
        "error: cannot upload to hf:owner/mine: the repository exists and is public. Name a new one, or make it private"
        " in https://huggingface.co/owner/mine/settings.\n"
    )
    assert (done.returncode, done.stdout, hub_in_process.repositories["owner/mine"]) == (1, "", {})
    hub_in_process.private.add("owner/mine")
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--private")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub_in_process.repositories["owner/mine"]


def test_failures_of_an_upload_are_one_line_and_say_how_to_log_in(
    hub_in_process: Any,
    tiny_tokenizer: Callable[..., Path],
    tmp_path: Path,
    vqpipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_tokenizer("mine")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--licence", "mit")
    assert done.returncode == 1
    assert "cannot upload to hf:owner/mine: HTTP status 401" in done.stderr
    assert "run `hf auth login`, or set HF_TOKEN" in done.stderr
    monkeypatch.delenv("HF_TOKEN")
    done = vqpipe(tmp_path, "push", "mine", "owner/mine", "--licence", "mit")
    assert done.stderr == (
        "error: cannot upload to hf:owner/mine: no token of the hub was found. To log in, run `hf auth login`, or set"
        " HF_TOKEN.\n"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    done = vqpipe(tmp_path, "push", "mine", "owner/two--names", "--licence", "mit")
    assert "'owner/two--names' is not a valid name. Write OWNER/NAME" in done.stderr
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in vqpipe(tmp_path, "push", "mine", "owner/mine", "--licence", "mit").stderr
    assert "owner/mine" not in hub_in_process.repositories


@pytest.mark.parametrize("name", ["owner/two words", "name", "owner/name@v1", "owner/name/more", ""])
def test_a_repository_is_owner_and_name_in_a_dry_run_too(
    name: str, tiny_tokenizer: Callable[..., Path], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    tiny_tokenizer("mine")
    done = vqpipe(tmp_path, "push", "mine", name, "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"error: {name!r} is not the name of a repository. Write OWNER/NAME, without spaces.\n")


def test_weights_whose_authors_state_no_licence_are_not_pushed_by_accident(
    hub_in_process: Any, tiny_tokenizer: Callable[..., Path], tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    path = tiny_tokenizer("imported")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["facts"] |= {"zoo": "vqgan-lc-f16-100k", "licence": "none stated"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    done = vqpipe(tmp_path, "push", "imported", "owner/copy")
    assert done.stderr == (
        "error: imported was imported from vqgan-lc-f16-100k, whose authors state no licence. Ask them; then pass"
        " --licence NAME, or --private.\n"
    )
    assert hub_in_process.log == []
    assert vqpipe(tmp_path, "push", "imported", "owner/copy", "--private").returncode == 0


def test_absent_repositories_and_wrong_revisions_are_one_line(
    hub_in_process: Any, tiny_tokenizer: Callable[..., Path]
) -> None:
    with pytest.raises(WeightsError, match="has no repository owner/absent, or it is private"):
        Tokenizer.from_pretrained("hf:owner/absent")
    with pytest.raises(
        WeightsError, match="'owner/absent' is not a directory, and hf:owner/absent cannot be downloaded"
    ):
        Tokenizer.from_pretrained("owner/absent")
    hub_in_process.repositories["owner/name"] = {}
    with pytest.raises(WeightsError, match="hf:owner/name@v9 cannot be downloaded: no such revision"):
        Tokenizer.from_pretrained("hf:owner/name@v9")
    with pytest.raises(ConfigError, match="names another revision than 'v2'"):
        Tokenizer.from_pretrained("hf:owner/name@v1", revision="v2")
    with pytest.raises(ConfigError, match="is a directory"):
        Tokenizer.from_pretrained(tiny_tokenizer("mine"), revision="v1")
