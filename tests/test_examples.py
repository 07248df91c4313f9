"""The examples of the guides run: a quantizer of one's own, the description of a data set, README's picture."""

import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.prepare_data import prepare_data
from stages.tokenize_images import tokenize
from vqpipe import Tokenizer
from vqpipe.artifacts import open_artifact
from vqpipe.errors import ConfigError, DataError
from vqpipe.quantizers import EmaConfig, QuantizerConfig, VqConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
QUANTIZERS = {"levels": EXAMPLES / "levels_quantizer.py", "rotation": EXAMPLES / "rotation_quantizer.py"}
CONTRACT = ROOT / "tests" / "quantizers" / "test_contract.py"
IN_ANOTHER_PROCESS = """
import inspect, runpy, sys
from contextlib import suppress
import torch
from stages import cli

kind, quantizer_file, contract_file, *arguments = sys.argv[1:]
sys.argv = ["vqpipe", "--import", quantizer_file, *arguments]
with suppress(SystemExit):
    cli.main()

from stages.tokenize_images import tokenize
from vqpipe import Tokenizer
from vqpipe.config import all_subclasses
from vqpipe.quantizers import CodebookConfig, build_quantizer

tokenizer = Tokenizer.from_pretrained(arguments[-1], device="cpu")
config = tokenizer.autoencoder.quantizer.config
assert config.kind == kind, config
contract = runpy.run_path(contract_file)
sizes = {"levels": {"channels": 3, "levels": 9}, "rotation": {"codebook_size": 40, "code_dim": 6}}[kind]
contract["EXAMPLES"][kind] = type(config)(**sizes)
fixed = "levels"  # codes that are computed, so that they cannot be standardized
tests = [function for name, function in contract.items() if name.startswith("test_")]
tests = [function for function in tests if list(inspect.signature(function).parameters) == ["name"]]
tests = [function for function in tests if kind != fixed or "standardized" not in function.__name__]
for test in tests:
    test(kind)
assert len(tests) >= 10

for rescale in (True, False) if kind == "rotation" else ():
    quantizer = build_quantizer(type(config)(codebook_size=40, code_dim=6, rescale=rescale))
    latent = torch.randn(2, 6, 3, 5, requires_grad=True)
    codes = quantizer(latent).codes
    gradient, = torch.autograd.grad((codes * codes.detach()).sum(), latent)  # the gradient of each vector is its code
    size = codes.norm(dim=1, keepdim=True) / (latent.norm(dim=1, keepdim=True) if rescale else 1)
    size = size * codes.norm(dim=1, keepdim=True) if rescale else size
    expected = latent / latent.norm(dim=1, keepdim=True) * size  # rotated onto the latent
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)
print("the contract holds")
"""
"""A class that is defined here would be registered for all later tests of this process."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantizer_of_the_guide_trains_and_keeps_the_contract(
    kind: str, tmp_path: Path, draw_folder: Callable[..., Path], python: Any
) -> None:
    draw_folder(tmp_path / "images", 12, side=64)
    options = f"train --preset smoke --precision fp32 --images images --set model.quantizer.kind={kind} --steps 2"
    options += " --set train.warmup_steps=0 --set train.whiten_init=true --set train.whiten_images=8"
    options += " --set model.quantizer.codebook_size=50" if kind == "rotation" else ""
    options += " --set objective.entropy=0 --out mine"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [kind, str(QUANTIZERS[kind]), str(CONTRACT), *options.split()]
    result = python(IN_ANOTHER_PROCESS, *words, folder=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "the contract holds"


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_code_of_the_guide_to_a_quantizer_is_that_of_the_example(kind: str) -> None:
    guide = (ROOT / "docs/guides/add-a-quantizer.md").read_text()
    (block,) = [each for each in guide.split("```python\n")[1:] if f'kind: ClassVar[str] = "{kind}"' in each]
    lines = iter(QUANTIZERS[kind].read_text().splitlines())
    for line in block.split("```")[0].strip().splitlines():  # in the order of the file; the guide leaves lines out
        assert line in lines, line


@pytest.mark.parametrize("guide", ["your-photographs", "tokens-to-transformer", "high-resolution"])
def test_python_of_a_guide_runs(
    guide: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw_folder: Callable[..., Path],
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "images", 6, side=40)
    small_tokenizer(VqConfig(codebook_size=64, code_dim=4)).save_pretrained(tmp_path / "tokenizer")
    tokenize([str(tmp_path / "images")], "tokenizer", tmp_path / "tokens", num_workers=0, device="cpu")
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        small = block.replace("range(1000)", "range(2)").replace("1024", "64").replace("768", "48")
        exec(compile(small, guide, "exec"), names)
    assert blocks


def test_data_set_of_the_guide_is_prepared_and_an_incomplete_copy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw_folder: Callable[..., Path]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = EXAMPLES / "flowers.toml"
    assert manifest.read_text() in (ROOT / "docs/guides/add-a-dataset.md").read_text()
    for split, count in (("train", 4), ("test", 1)):
        (tmp_path / "copy" / split).mkdir(parents=True)
        for name in ("rose", "tulip"):
            draw_folder(tmp_path / "copy" / split / name, count)
    prepare_data(str(manifest), str(tmp_path / "copy"), tmp_path / "train", split="train")
    facts = open_artifact(tmp_path / "train", "dataset").facts
    assert (facts["num_images"], facts["num_classes"]) == (8, 2)
    with pytest.raises(DataError, match="should hold 4 images, found 2"):
        prepare_data(str(manifest), str(tmp_path / "copy"), tmp_path / "test", split="test")


def test_readme_picture_has_a_column_for_each_tokenizer_at_equal_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw_folder: Callable[..., Path],
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = draw_folder(tmp_path / "images", 6, side=40)
    for name, size in (("fc", 64), ("lc", 64), ("more", 128)):
        config = VqConfig(codebook_size=size, code_dim=4) if name == "fc" else EmaConfig(codebook_size=size, code_dim=4)
        small_tokenizer(config).save_pretrained(tmp_path / name)
    script = runpy.run_path(str(ROOT / "docs" / "images" / "reconstructions.py"))
    script["main"].__globals__.update(COUNT=3, SIDE=32)
    arguments = [str(images), str(tmp_path / "picture.png"), f"FC={tmp_path / 'fc'}"]
    script["main"](*arguments, f"LC={tmp_path / 'lc'}")
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape[1] == 6 * 32 + 5 * 4  # two images per row, each with two reconstructions
    assert picture.shape[0] > 2 * 32 + 4  # two rows below the labels
    assert (picture[-32:, 3 * 36 :] == 255).all()  # the third image is alone in its row
    with pytest.raises(ConfigError, match=r"different bits per pixel: FC 0\.375, LC 0\.438"):
        script["main"](*arguments, f"LC={tmp_path / 'more'}")
