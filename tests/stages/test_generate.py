"""`vqpipe generate` as a function: an image is a function of seed and number; resuming; settings; errors."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.generate import generate, parse_classes, parse_top_k
from vqpipe.artifacts import open_artifact
from vqpipe.data.images import open_images
from vqpipe.data.tokens import read_tokens
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.generation import generate as job
from vqpipe.generation.image_generator import open_generator
from vqpipe.reports.pictures import from_png


def pixels(folder: Path) -> list[np.ndarray]:
    """The pixels of every sample, in order."""
    found = []
    for shard in open_artifact(folder, "images").names("*.tar"):
        with tarfile.open(folder / shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".png") and file is not None:
                    found.append(np.array(Image.open(io.BytesIO(file.read()))))
    return found


def test_images_have_classes_in_turn_and_a_contact_sheet(drawn: Any, tmp_path: Path) -> None:
    generate(drawn.generator, tmp_path / "made", num_images=7, device="cpu")
    images = open_images(tmp_path / "made")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]  # in turn
    assert images.num_classes == 3
    made = pixels(tmp_path / "made")
    assert [image.shape for image in made] == [(8, 8, 3)] * 7
    assert len({image.tobytes() for image in made}) == 7
    sheet = from_png((tmp_path / "made" / "contact-sheet.png").read_bytes()).permute(1, 2, 0).numpy()
    for number, image in enumerate(made):
        assert (sheet[4:12, 4 + 12 * number : 12 + 12 * number] == image).all()


@pytest.mark.parametrize("name", ["config.json", "tokenizer/config.json", "tokenizer/model.safetensors"])
def test_damaged_files_of_a_generator_are_refused(name: str, drawn: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(drawn.generator, tmp_path / "generator")
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: sha256 \w{{12}}, published as"):
        generate(copy, tmp_path / "made", num_images=1, device="cpu")


def test_an_image_is_a_function_of_seed_and_number(drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"classes": "1", "device": "cpu", "batch_size": 4}
    generate(drawn.generator, tmp_path / "few", num_images=6, **options)
    monkeypatch.setattr(job, "IMAGES_PER_SHARD", 4)
    generate(drawn.generator, tmp_path / "many", num_images=10, **options)
    generate(drawn.generator, tmp_path / "other", num_images=6, **options, seed=1)
    few, many, other = (pixels(tmp_path / name) for name in ("few", "many", "other"))
    assert all((a == b).all() for a, b in zip(few, many[:6], strict=True))
    assert len({image.tobytes() for image in (*many, *other)}) == 16  # nor is one repeated under another number or seed


def test_kept_ids_decode_to_the_images_and_change_nothing_else(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "IMAGES_PER_SHARD", 4)
    generate(drawn.generator, tmp_path / "plain", num_images=6, device="cpu")
    generate(drawn.generator, tmp_path / "kept", num_images=6, device="cpu", keep_ids=True)
    plain, kept = (open_artifact(tmp_path / name) for name in ("plain", "kept"))
    assert set(kept.manifest.files) - set(plain.manifest.files) == {"ids-000000.parquet", "ids-000001.parquet"}
    assert {name: file for name, file in kept.manifest.files.items() if name in plain.manifest.files} == dict(
        plain.manifest.files
    )
    tokenizer = open_generator(drawn.generator).tokenizer
    files = [read_tokens(kept.file(name), tokenizer.codebook_size) for name in kept.names("*.parquet")]
    images = open_images(tmp_path / "kept")
    assert [key for tokens in files for key in tokens.keys] == [images.key(i) for i in range(6)]
    assert torch.cat([tokens.labels for tokens in files]).tolist() == images.labels.tolist()
    decoded = tokenizer.decode(torch.cat([tokens.ids for tokens in files]), (8, 8))
    made = torch.from_numpy(np.stack(pixels(tmp_path / "kept"))).permute(0, 3, 1, 2)
    assert torch.equal(decoded, made)


@pytest.mark.parametrize("keep_ids", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_ids: bool
) -> None:
    monkeypatch.setattr(job, "IMAGES_PER_SHARD", 2)
    options: dict[str, Any] = {"num_images": 6, "device": "cpu", "keep_ids": keep_ids}
    generate(drawn.generator, tmp_path / "whole", **options)
    sample_shard, sampled = job.sample_shard, list[int]()

    def interrupted(generator: Any, plan: Any, images: range) -> Any:
        sampled.append(images.start)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return sample_shard(generator, plan, images)

    monkeypatch.setattr(job, "sample_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(drawn.generator, tmp_path / "cut", **options)
    generate(drawn.generator, tmp_path / "cut", **options)
    assert sampled == [0, 2, 2, 4]  # the first shard was kept
    assert open_artifact(tmp_path / "cut").digest == open_artifact(tmp_path / "whole").digest
    with pytest.raises(ArtifactError, match=r"num_images was 6, now 7"):
        generate(drawn.generator, tmp_path / "cut", **options | {"num_images": 7})


def test_flags_override_set_and_set_overrides_the_preset(drawn: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_images": 1, "device": "cpu"}
    generate(drawn.generator, tmp_path / "a", **options)
    generate(
        drawn.generator,
        tmp_path / "b",
        **options,
        top_k="25%",
        cfg_scale=3.0,
        overrides=["generate.cfg_scale=2.0", "generate.cfg_schedule=linear"],
    )
    a, b = (open_artifact(tmp_path / name).config["generate"] for name in "ab")
    assert (a["cfg_scale"], a["top_p"], a["cfg_schedule"]) == (1.5, 0.95, "constant")
    assert (b["cfg_scale"], b["top_p"], b["cfg_schedule"], b["top_k"]) == (3.0, 0.95, "linear", 0.25)


def test_top_k_is_parsed_as_a_count_or_a_share() -> None:
    assert [parse_top_k(text) for text in ("0", "4096", "10%", "0.5")] == [0, 4096, 0.1, 0.5]
    assert [type(parse_top_k(text)) for text in ("1", "100%")] == [int, float]


def test_classes_without_training_images_are_refused(drawn: Any) -> None:
    opened = replace(open_generator(drawn.generator), classes=(0, 217, 482, 500, 501, 600, 700))
    assert parse_classes("217,500-501", opened) == (217, 500, 501)
    with pytest.raises(ConfigError, match=r"there is no class 1\. This .* classes 0, 217, 482, 500, 501 and 2 more"):
        parse_classes("0-9", opened)


def test_invalid_options_are_refused(drawn: Any, tmp_path: Path) -> None:
    def refused(match: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        options = {"num_images": 2, "device": "cpu", **changes}
        generator = options.pop("generator", drawn.generator)
        with pytest.raises(error, match=match):
            generate(generator, tmp_path / "out", **options)
        assert not list(tmp_path.glob("out*"))

    refused("there is no class 3. This generator was trained on the classes 0, 1, 2", classes="0,1-3")
    refused("'x' is not a class or range", classes="1,x")
    refused("'5-3' is not a class or range", classes="5-3")
    refused("--top-k many is not a number", top_k="many")
    refused("top_k = 65, and there are 64 ids. Use 0 for all of them", top_k="65")
    refused(r"generate\.top_p = 1\.5. It must be above 0 and at most 1", top_p=1.5)
    refused(r"only \[generate\] can be set here", overrides=["train.steps=3"])
    refused("unknown key generate.cfg_scal", overrides=["generate.cfg_scal=3"])
    refused(r"--steps is for generators trained on latents.* is of the kind llamagen", steps=9)
    refused(r"--steps is for generators trained on latents", steps=250)  # the default of the setting
    refused("generate.sampler is for generators trained", overrides=["generate.sampler=ddim"])
    refused("is of kind tokens, generator is needed", ArtifactError, generator=drawn.tokens)


@pytest.mark.slow
def test_one_and_two_ranks_sample_the_same_images(drawn: Any, tmp_path: Path) -> None:
    words = ["-m", "stages", "generate", "--generator", str(drawn.generator)]
    words += ["--num-images", "520", "--device", "cpu", "--keep-ids"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for ranks in ("1", "2"):
        command = [*launch, ranks, *words, "--out", str(tmp_path / ranks)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert [len(open_artifact(tmp_path / "1").names(pattern)) for pattern in ("*.tar", "ids-*.parquet")] == [3, 3]
    assert open_artifact(tmp_path / "1").digest == open_artifact(tmp_path / "2").digest


def test_images_as_png_files_are_those_of_the_tars_with_their_labels(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "IMAGES_PER_SHARD", 4)
    options: dict[str, Any] = {"num_images": 6, "batch_size": 4, "device": "cpu"}
    generate(drawn.generator, tmp_path / "tars", **options)
    write = job.write_shard

    def interrupted(draft: Any, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return write(draft, number, *rest)

    monkeypatch.setattr(job, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(drawn.generator, tmp_path / "files", form="png", **options)
    monkeypatch.setattr(job, "write_shard", write)
    generate(drawn.generator, tmp_path / "files", form="png", **options)
    files = sorted(file.name for file in (tmp_path / "files" / "images").glob("*.png"))
    assert files == [f"{number:08d}.png" for number in range(6)]
    tars, found = open_images(tmp_path / "tars"), open_images(tmp_path / "files")
    assert [(sample.image, sample.label) for sample in found] == [(sample.image, sample.label) for sample in tars]
    assert (found.num_classes, found.name, found.remarks) == (3, "files", [])
    sheets = [(tmp_path / name / "contact-sheet.png").read_bytes() for name in ("tars", "files")]
    assert sheets[0] == sheets[1]
    with pytest.raises(ArtifactError, match=r"as was not set, now \"png\""):
        generate(drawn.generator, tmp_path / "tars", form="png", **options)
