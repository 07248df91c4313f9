"""The page of a training run."""

import re
from html import unescape
from typing import Any

import torch

from vqpipe.reports import page
from vqpipe.reports.pictures import ImagePair, to_png
from vqpipe.reports.training import TrainingRun, describe_tokenizer, newest_number, run_curves, training_page

TOKENIZER = {"quantizer": "vq", "codebook_size": 64, "num_groups": 1, "downsample_factor": 2}


def row(step: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "images_seen": 8 * step,
        "loss/total": 1 / step,
        "loss/l1": 0.5 / step,
        "psnr": 10.0 + step,
        "utilization": 0.5,
        "perplexity": 20.0,
        "window_tokens": 1000,
        "learning_rate": 5e-4,
        "gradient_norm": 0.3,
        "images_per_second": 40.0,
        "data_wait": 0.1,
        "nonfinite_steps": 0,
        **more,
    }


def valid(step: int, psnr: float) -> dict[str, Any]:
    return {
        "step": step,
        "images_seen": 8 * step,
        "valid/images": 64,
        "valid/psnr": psnr,
        "valid/ssim": 0.5,
        "valid/utilization": 0.25,
        "valid/perplexity": 12.0,
    }


def html(**given: Any) -> str:
    run = TrainingRun(
        **{"name": "lc", "description": describe_tokenizer(TOKENIZER), "step": 20, "steps": 40, "rows": [], **given}
    )
    return page.render(training_page(run))


def test_run_without_rows_has_a_page() -> None:
    text = html(step=0)
    assert "vq quantizer, 64 codes, downsample factor 2. Step 0 of 40" in text
    assert "<svg" not in text
    assert "<table" not in text


def test_newest_numbers_and_best_validation_are_shown() -> None:
    rows = [row(10), valid(10, 22.5), row(20, psnr=31.25), valid(20, 21.75)]
    text = html(rows=rows, best_step=10)
    words = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "training PSNR 31.25 dB of the mean squared error since the last row of the log" in words
    assert "validation PSNR 21.75 dB mean over images; best at step 10" in words
    assert '<td class="best">22.50</td>' in text
    assert '<td class="best">21.75</td>' not in text
    assert "skipped steps" not in text
    assert "skipped steps" in html(rows=[*rows, row(21, nonfinite_steps=2)])


def test_the_best_step_is_noted_at_the_number_that_decides() -> None:
    rows = [row(10), valid(10, 22.5) | {"valid/lpips_vgg": 0.3}]
    words = " ".join(re.sub(r"<[^>]+>", " ", html(rows=rows, best_step=10, best_measure="valid/lpips_vgg")).split())
    assert "validation PSNR 22.50 dB mean over images validation" in words
    assert "validation LPIPS (VGG) 0.300 best at step 10" in words


def test_the_learning_rate_is_a_tile_during_the_run_alone() -> None:
    for step, shown in ((20, True), (40, False)):
        run = TrainingRun(name="lc", description="", step=step, steps=40, rows=[row(10), row(step)])
        (numbers,) = [each for each in training_page(run).sections if isinstance(each, page.Numbers)]
        assert any(number.label == "learning rate" for number in numbers.numbers) == shown


def test_the_numbers_of_the_validation_come_first() -> None:
    run = TrainingRun(name="lc", description="", step=20, steps=40, rows=[row(10), valid(10, 22.5), row(20)])
    first, second, *_ = training_page(run).sections
    assert isinstance(first, page.Numbers)
    assert isinstance(second, page.Numbers)
    assert (first.title, second.title) == ("Validation", "Training")
    assert first.numbers[0].label == "validation PSNR"
    assert first.caption == "64 held-out images at step 10."
    again = TrainingRun(name="lc", description="", step=20, steps=40, rows=[valid(10, 22.5), valid(20, 23.0)])
    assert training_page(again).sections[0].caption == "64 held-out images at step 20."  # type: ignore[union-attr]
    assert not any(number.label.startswith("validation") for number in second.numbers)
    without = TrainingRun(name="lc", description="", step=20, steps=40, rows=[row(10)])
    assert training_page(without).sections[0].title == "Current metrics"


def test_the_title_names_the_images() -> None:
    leaf = {"kind": "data", "name": "imagenette", "content": "", "inputs": {}}
    assert "<h1>lc on imagenette</h1>" in html(
        lineage={**leaf, "kind": "tokenizer", "name": "lc", "inputs": {"images": leaf}}
    )
    assert "<h1>lc</h1>" in html()


def test_legends_of_losses_are_in_words() -> None:
    assert "L1 distance ends at" in html(rows=[row(10), row(20), row(30)])


def test_only_logged_numbers_have_curves() -> None:
    rows = [line for step in (10, 20, 30) for line in (row(step), valid(step, 21.0))]
    drawn = set(re.findall(r"<h3>([^<]+)</h3>", html(rows=rows)))
    assert drawn == {
        *("Loss", "Training PSNR, dB", "Validation PSNR, dB", "Codes in use"),
        *("Perplexity of the codes in training", "Perplexity of the codes in validation"),
        *("Learning rate", "Gradient norm", "Images per second"),
    }
    few = [{"step": step, "images_seen": 8 * step, "psnr": 20.0} for step in (1, 2, 3)]
    assert re.findall(r"<h3>([^<]+)</h3>", html(rows=few)) == ["Training PSNR, dB"]


def test_each_line_of_a_curve_is_of_the_quantity_that_it_names() -> None:
    keys = {"train/top1": 0.1, "valid/top1": 0.2, "valid/top5": 0.3, "loss/total": 4.0, "valid/total": 5.0}
    classifier = [{"step": step, "valid/images": 4, **keys} for step in (1, 2, 3)]
    drawn = {plot.title: plot.alt for plot in run_curves(classifier)}
    assert drawn["Loss"] == "training ends at 4, validation ends at 5"
    assert drawn["Accuracy"] == "training top-1 ends at 10.0 %, validation top-1 ends at 20.0 %, top-5 ends at 30.0 %"
    tokenizer = [{**row(step, psnr=20.0), **valid(step, 21.0), "valid/lpips_vgg": 0.3} for step in (1, 2, 3)]
    drawn = {plot.title: plot.alt for plot in run_curves(tokenizer)}
    assert drawn["Training PSNR, dB"] == "training ends at 20"
    assert drawn["Validation PSNR, dB"] == "validation ends at 21"
    assert drawn["LPIPS in validation"] == "VGG ends at 0.3"
    assert drawn["Codes in use"] == "training ends at 50.0 %, validation ends at 25.0 %"
    assert drawn["Perplexity of the codes in training"] == "training ends at 20"
    assert drawn["Perplexity of the codes in validation"] == "validation ends at 12"


def test_one_or_two_points_are_no_curve() -> None:
    text = html(rows=[row(10), valid(10, 21.0), row(20)])
    assert "<h3>" not in text
    assert ">Curves<" not in text


def test_page_has_reconstructions_codes_and_settings_and_loads_nothing() -> None:
    pixels = torch.full((3, 16, 16), 90, dtype=torch.uint8)
    text = html(
        name="<lc>",
        rows=[row(10)],
        shown=[ImagePair("a & b", to_png(pixels), to_png(pixels + 10), 28.1)],
        shown_note="Held-out images, reconstructed at step 20.",
        counts=torch.tensor([[5, 0, 3, 0]]),
        counts_note="On 64 held-out images, at step 20.",
        settings={"model": {"quantizer": {"kind": "vq", "normalize": False}}},
        command="vqpipe train --out lc",
    )
    assert "&lt;lc&gt;" in text
    assert "<lc>" not in text
    assert "a &amp; b" in text
    assert "2 of 4 codes in use (50.0 %)" in text
    assert "On 64 held-out images, at step 20." in text
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", text)]
    assert cells == ['"vq"', "false"]  # as presets and --set have them
    assert "vqpipe train --out lc" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_counts_of_zero_have_no_map() -> None:
    assert "Codebook utilization" not in html(counts=torch.zeros(1, 4, dtype=torch.int64))


def test_newest_is_the_last_finite_number() -> None:
    rows = [row(1), row(2, psnr=12.5), row(3, psnr=float("nan"))]
    assert newest_number(rows, "psnr") == 12.5
    assert newest_number(rows, "valid/psnr") is None


def test_page_of_a_generator_has_samples_losses_and_accuracies() -> None:
    png = to_png(torch.full((3, 16, 16), 90, dtype=torch.uint8))
    rows = [
        {"step": 1, "images_seen": 8, "loss/total": 2.0, "loss/head": 1.0, "valid/total": 2.5, "valid/top1": 0.25},
        *({"step": i, "images_seen": 8 * i, "loss/total": 1.0, "loss/head": 0.5, "train/top1": 0.5} for i in (2, 3, 4)),
    ]
    text = html(description="gpt on tokens.", rows=rows, samples=png, samples_note="The same seeds.")
    assert "gpt on tokens. Step 20 of 40." in text
    assert "The same seeds." in text
    assert set(re.findall(r"<h3>([^<]+)</h3>", text)) >= {"Loss", "Parts of the loss", "Accuracy"}
    assert "validation top-1" in text
