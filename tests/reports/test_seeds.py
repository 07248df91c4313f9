"""Tokenizers that differ only in the seed share a row, and plots over the codebook size."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch

from vqpipe.reports import page
from vqpipe.reports.comparison import comparison_page
from vqpipe.reports.evaluation import MEASURES, EvaluationResult
from vqpipe.reports.seeds import (
    common_name,
    configurations_of,
    numbers_over_seeds,
    seeds_table,
    settings_of,
    size_plots,
)

SIZES = (1024, 2048, 4096)
PSNR, UTILIZATION = (next(m for m in MEASURES if m.key == key) for key in ("psnr", "utilization"))


def trained(
    name: str,
    seed: int,
    psnr: float,
    k: int = 1024,
    quantizer: str = "vq",
    groups: int = 1,
    options: str = "",
    steps: int = 9,
) -> EvaluationResult:
    """An evaluation of a tokenizer that `vqpipe train` made."""
    tokenizer = {"quantizer": quantizer, "codebook_size": k, "num_groups": groups, "downsample_factor": 8}
    metrics: dict[str, Any] = {
        "protocol": "adm",
        "num_images": 50,
        "image_size": 256,
        "reference": "photos",
        "psnr": psnr,
        "rfid": {},
        "utilization": 0.5,
        "utilization_per_group": [0.5] * groups,
        "perplexity_per_group": [2.0] * groups,
        "bits_per_pixel": groups * (k.bit_length() - 1) / 64,
        "num_tokens_per_image": 16,
        "not_computed": {},
        "tokenizer": tokenizer,
    }
    images = {"kind": "data", "name": "photos", "content": "photos", "inputs": {}}
    made = {"kind": "tokenizer", "name": name, "content": name, "inputs": {"images": images}}
    lineage = {"kind": "report", "name": "r", "content": "", "inputs": {"images": images, "tokenizer": made}}
    command = f"vqpipe train --images elsewhere/{seed} --seed {seed} --out {name} --set train.steps={steps} {options}"
    commands = [command, "vqpipe eval"]
    history = [{"step": steps}]
    return EvaluationResult(
        name, metrics, torch.ones(groups, 4).long(), history=history, lineage=lineage, commands=commands
    )


def test_rows_are_grouped_by_all_settings_but_the_seed() -> None:
    several = [trained("a-s0", 0, 23.0), trained("b", 0, 22.0, options="--precision fp32"), trained("a-s1", 1, 23.2)]
    found = configurations_of(several)
    assert [(each.name, [member.name for member in each.members]) for each in found] == [
        ("a", ["a-s0", "a-s1"]),
        ("b", ["b"]),
    ]
    assert len(configurations_of([trained("a", 0, 23.0), trained("c", 1, 23.0, k=2048)])) == 2
    assert len(configurations_of([trained("a", 0, 23.0), trained("c", 0, 23.1)])) == 2  # not by the seed
    imported = [EvaluationResult(each.name, each.metrics, each.counts, commands=["vqpipe eval"]) for each in several]
    assert len(configurations_of(imported)) == 3  # without a command of training nothing is equal


def test_settings_that_the_reports_hold_are_compared_and_not_the_words_of_the_command() -> None:
    several = [trained("a-s0", 0, 23.0), trained("a-s1", 1, 23.2, options="--preset copy.toml"), trained("b", 2, 23.1)]
    for each, size in zip(several, (4, 4, 8), strict=True):
        seed = int(each.commands[0].split("--seed ")[1][0])
        each.metrics["training"] = {"train": {"global_batch_size": size}, "seed": seed}
    assert [each.name for each in configurations_of(several)] == ["a", "b"]


def test_configurations_with_one_common_name_are_told_apart() -> None:
    several = [trained(f"run-{n}", n % 2, 22.0 + n, options=f"--set train.betas={n // 2}") for n in range(4)]
    numbers = numbers_over_seeds(configurations_of(several), [PSNR])
    assert {name: each["psnr"]["mean"] for name, each in numbers.items()} == {
        "run-0, run-1": 22.5,
        "run-2, run-3": 24.5,
    }


def test_command_of_training_may_import_a_plugin() -> None:
    several = [trained(f"a-s{seed}", seed, 23.0) for seed in (0, 1)]
    for each in several:
        each.commands[0] = each.commands[0].replace("vqpipe train", "vqpipe --import mine --import=other train")
    assert [each.name for each in configurations_of(several)] == ["a"]


def test_settings_are_the_options_in_any_order_without_seed_and_paths() -> None:
    words = [
        "train",
        "--set",
        "a=1",
        "--download",
        "--seed=3",
        "--set",
        "b=2",
        "--out",
        "x",
        "--codebook",
        "c",
        "--validation",
        "v",
    ]
    other = ["train", "--out=y", "--set", "b=2", "--download", "--set", "a=1", "--seed", "4"]
    assert settings_of(words) == settings_of(other) == ["--download ", "--set a=1", "--set b=2"]


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["lc-16384-seed-0", "lc-16384-seed-1"], "lc-16384"),
        (["lc_s10", "lc_s11"], "lc"),
        (["lc-1", "lc-2"], "lc"),
        (["one", "two"], "one"),
        (["same", "same"], "same"),
        (["gauss-0", "gauss-1"], "gauss"),
    ],
)
def test_a_configuration_has_the_common_part_of_its_names(names: list[str], name: str) -> None:
    assert common_name(names) == name


def test_means_have_the_sample_standard_deviation_and_the_best_is_highlighted() -> None:
    found = configurations_of([trained("a-s0", 0, 23.0), trained("a-s1", 1, 23.2), trained("b", 0, 22.0, k=64)])
    table = seeds_table("set", found, [PSNR, UTILIZATION])
    assert table is not None
    assert table.header == ["tokenizer", "codes", "seeds", "PSNR, dB", "codes in use, %"]
    assert [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows] == [
        ["a", "1,024", "2", "23.10 ± 0.14", "50.0 ± 0.0"],
        ["b", "64", "1", "22.00", "50.0"],
    ]
    assert [row[3].best for row in table.rows if isinstance(row[3], page.Cell)] == [True, False]
    assert seeds_table("set", configurations_of([trained("a", 0, 23.0), trained("b", 0, 22.0, k=64)]), [PSNR]) is None
    (numbers,) = numbers_over_seeds(found, [PSNR]).values()
    assert numbers["names"] == ["a-s0", "a-s1"]
    assert numbers["psnr"] == {"mean": pytest.approx(23.1), "std": pytest.approx(0.02**0.5)}
    assert found[0].mean_and_spread("ssim") is None
    found[0].members[0].metrics["ssim"] = 0.5  # type: ignore[index]
    assert found[0].mean_and_spread("ssim") is None  # of one seed alone it would be no mean over seeds


def test_plots_over_the_codebook_size_have_a_line_for_each_method() -> None:
    several = [
        *(trained(f"vq-{k}-s{seed}", seed, 20.0 + seed + k / 1024, k) for k in SIZES for seed in (0, 1)),
        *(trained(f"mg-{k}", 0, 25.0, k, "multi_group", 4) for k in SIZES),
    ]
    drawn = size_plots(configurations_of(several))
    titles = ["PSNR (dB) over log2 K", "Utilization over K", "PSNR (dB) over bits per position"]
    assert [plot.title for plot in drawn] == titles
    assert drawn[0].alt.startswith("vq, G = 1 21.50 at 10, vq, G = 1 22.50 at 11, vq, G = 1 24.50 at 12, multi")
    assert "vq, G = 1 50.0 % at 4,096" in drawn[1].alt
    assert drawn[2].alt.endswith(
        "multi_group, G = 4 25.00 at 40, multi_group, G = 4 25.00 at 44, multi_group, G = 4 25.00 at 48"
    )
    texts = {"".join(node.itertext()) for node in ET.fromstring(drawn[0].svg).iter() if node.tag.endswith("text")}
    assert {"vq, G = 1", "multi_group, G = 4"} <= texts
    assert drawn[0].caption == "Bars: standard deviation over seeds."
    plain = size_plots(configurations_of(several[0:6:2]))
    assert [plot.title for plot in plain] == titles[:2]  # bits are log2 K


def test_there_is_no_plot_over_the_codebook_size_without_three_sizes_of_equal_steps() -> None:
    assert size_plots(configurations_of([trained(f"{k}", 0, 20.0, k) for k in SIZES[:2]])) == []
    steps = zip(SIZES, (60, 3000, 3000), strict=True)
    assert size_plots(configurations_of([trained(f"{k}", 0, 20.0, k, steps=each) for k, each in steps])) == []


def test_the_page_begins_with_the_means_over_seeds() -> None:
    several = [trained("a-s0", 0, 23.0), trained("a-s1", 1, 23.2)]
    several += [trained(f"{k}", 0, 22.0, k) for k in (64, 256)]
    shown = comparison_page(several, "three")
    titles = [section.title for section in shown.sections]
    assert titles[0] == "Over seeds: 50 images of photos at 256 px, protocol adm"
    assert "Codebook size, protocol adm" in titles
    assert "23.10 ± 0.14" in page.render(shown)
