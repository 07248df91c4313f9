"""The entries of the zoo are complete, and agree with the presets and the importer."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from stages import recipe
from vqpipe import continuous, downloads, zoo
from vqpipe.errors import ConfigError
from vqpipe.models import build_autoencoder
from vqpipe.models.released import FAMILIES
from vqpipe.presets import names
from vqpipe.tokenizer_files import model_facts

ENTRIES = {entry.name: entry for entry in zoo.entries()}
IMPORTED = {name: entry for name, entry in ENTRIES.items() if not entry.refused}
WITH_PRESET = {name: entry for name, entry in ENTRIES.items() if entry.preset}


@pytest.fixture(autouse=True)
def _no_initial_weights(uninitialized: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Networks on the meta device have no data."""
    with uninitialized():
        yield


def test_names_are_words_that_are_neither_paths_nor_addresses() -> None:
    assert len(ENTRIES) > 40
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_entry_is_complete(entry: zoo.Entry) -> None:
    assert entry.family in {*FAMILIES, *continuous.KINDS} or entry.refused
    assert entry.title
    assert entry.paper
    assert entry.licence
    assert entry.page.startswith("https://")
    for file in entry.files:
        assert file.name == file.name.rpartition("/")[2] != ""
        assert file.sha256 == "" or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert not file.sha256_of or file.sha256
        if file.source:
            address = downloads.parse(file.source)
            assert address is not None
            assert address.path.rpartition("/")[2] == file.name
            assert isinstance(address, downloads.Url) or address.page == entry.page
    for published in entry.published:
        assert published.numbers()
        assert published.protocol
        assert published.source
        assert published.utilization is None or published.utilization <= 1


def test_importable_tokenizers_have_a_preset_unless_their_size_is_unknown() -> None:
    without = {name for name, entry in IMPORTED.items() if not entry.preset and entry.family in FAMILIES}
    later = {entry.name for entry in ENTRIES.values() if entry.family in ("wetok", "bitdance", "simvq", "fvq")}
    importable = {name for name in later if not ENTRIES[name].refused}
    assert without == {"open-magvit2-pretrain-16k", "open-magvit2-pretrain-262k"} | importable
    assert {entry.preset for entry in WITH_PRESET.values()} <= set(names("model"))


@pytest.mark.parametrize("entry", WITH_PRESET.values(), ids=lambda entry: entry.name)
def test_sizes_are_those_of_the_preset(entry: zoo.Entry) -> None:
    with torch.device("meta"):
        autoencoder = build_autoencoder(recipe.load(entry.preset, list(entry.settings)).model)
    facts = model_facts(autoencoder)
    assert facts["downsample_factor"] == entry.downsample_factor
    assert (facts["codebook_size"], facts["num_groups"]) == (entry.codes, entry.groups)
    side = zoo.SIDE // autoencoder.downsample_factor
    assert autoencoder.quantizer.layout(side, side).num_tokens == entry.num_tokens
    assert autoencoder.quantizer.latent_dim == entry.groups * (entry.code_dim or 0)


@pytest.mark.parametrize(
    ("name", "bits"), [("llamagen-f16", 14 / 256), ("mgvq-f8-g8", 88 / 64), ("var-f16", 680 * 12 / 65536)]
)
def test_bits_per_pixel(name: str, bits: float) -> None:
    assert ENTRIES[name].bits_per_pixel == pytest.approx(bits)


def test_unknown_sizes_give_no_bits_per_pixel() -> None:
    assert ENTRIES["sd-vae"].bits_per_pixel is None
    assert ENTRIES["wetok-f8"].bits_per_pixel is None


def test_words_select_entries() -> None:
    assert {entry.family for entry in zoo.find(["llamagen"])} == {"llamagen"}
    assert [entry.name for entry in zoo.find(["MAGVIT2", "f8"])] == ["open-magvit2-f8"]
    with pytest.raises(ConfigError, match="Did you mean llamagen-f16"):
        zoo.find(["llamagem-f16"])
