"""A headless browser, and report pages with synthetic pictures."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from vqpipe.reports import page, pictures
from vqpipe.reports.comparison import comparison_page
from vqpipe.reports.evaluation import EvaluationResult
from vqpipe.reports.evaluation_page import evaluation_page
from vqpipe.reports.pictures import ImagePair

HEIGHT, WIDTH = 48, 64
COMMAND = "vqpipe eval --images 'my photos' --tokenizer lc --out DIR"
TRAIN = "vqpipe train --preset mgvq-f16-g4 --images photos --steps 10 --out lc --set objective.lpips_weights=W"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium for all tests; skips without Chromium or playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


class OpenPage:
    """An open page, its console messages and errors, and its network requests."""

    def __init__(self, context: Any, file: Path, script: bool = True) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        if script:
            self.page.wait_for_function(FILLED)


FILLED = "() => [...document.querySelectorAll('.card')].every((card) => card.querySelector('.slide'))"


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., OpenPage]]:
    """`open(html, **how)` in a fresh offline context: `viewport`, `color_scheme`, `has_touch`, ..."""
    contexts = []

    def open_it(html: str, **how: Any) -> OpenPage:
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(offline=True, **how)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        return OpenPage(context, file, how.get("java_script_enabled", True))

    yield open_it
    for context in contexts:
        context.close()


def drawn(name: str, number: int, why: Literal["spread", "worst", "best"] = "spread", green: int = 90) -> ImagePair:
    """A reddish image and its bluish reconstruction, so that pixels show which one is visible."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    waves = (40 * torch.sin(rows / (2 + number)) * torch.cos(columns / 5)).to(torch.int64)
    original = torch.stack([200 + waves, 90 + waves, 60 + 0 * waves]).clamp(0, 255).to(torch.uint8)
    again = torch.stack([40 + 0 * waves, green + waves // 2, 200 + waves]).clamp(0, 255).to(torch.uint8)
    return ImagePair(name, pictures.to_png(original), pictures.to_png(again), 12.5 + number, why)


def evaluated(name: str = "lc", seed: int = 0, images: str = "photos") -> EvaluationResult:
    """An evaluation by two protocols with every optional number."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (2, 100), generator=generator)
    green = 90 + 60 * seed
    shown = [drawn(each, number, green=green) for number, each in enumerate(("meadow", "harbour", "stairs"))]
    shown += [drawn("night", 3, "worst", green), drawn("sky", 9, "best", green)]
    words = {"crop": "cover: center", "reference": "the same crops", "rounding": "truncated", "resize": "PIL bicubic"}
    metrics: dict[str, Any] = {
        "protocol": "adm",
        "num_images": 60,
        "image_size": 64,
        "reference": images,
        "rfid": {"adm": 3.25 + seed},
        "psnr": 21.5 + seed,
        "ssim": 0.61,
        "psnr_of_mean_mse": 20.75,
        "frechet": {"mobilenet": 8.5},
        "protocols": {
            "adm": {"psnr": 21.5 + seed, "ssim": 0.61, "rfid": 3.25 + seed, "kid": {"mean": 0.002, "std": 0.001}},
            "cleanfid-matched": {**words, "psnr": 20.5, "rfid": 2.5, "reference_digest": f"{images}-cover"},
        },
        "utilization": 0.875,
        "utilization_per_group": [0.9, 0.85],
        "perplexity_per_group": [60.0, 58.5],
        "gini_per_group": [0.3, 0.25],
        "num_dead_per_group": [10, 15],
        "min_count_per_group": [0, 0],
        "max_count_per_group": [8, 8],
        "utilization_at": [
            {
                "tokens": 65_536,
                "utilization": 0.8,
                "utilization_per_group": [0.7, 0.9],
                "uniform_utilization": -math.expm1(65_536 * math.log1p(-1 / 100_000)),
            }
        ],
        "joint_entropy": 9.5,
        "joint_coverage": 0.75,
        "bits_per_pixel": 0.2,
        "bits_per_pixel_entropy": 0.18,
        "num_tokens_per_image": 128,
        "prefixes": [
            {"groups": k, "bits_per_pixel": 0.1 * k, "psnr": 19.0 + k, "ssim": 0.5 + 0.05 * k} for k in (1, 2)
        ],
        "not_computed": {"lpips_vgg": "LPIPS needs weights: no folder was named."},
        "tokenizer": {"quantizer": "multi_group", "codebook_size": 100, "num_groups": 2, "downsample_factor": 8},
    }
    history = [{"step": i, "images_seen": 8 * i, "loss/total": 1 / i, "psnr": 15.0 + i} for i in (1, 2, 3)]
    leaf = {"kind": "data", "name": images, "content": "b" * 64, "inputs": {}}
    tokenizer = {"kind": "tokenizer", "name": name, "content": name, "inputs": {"images": leaf}}
    lineage = {"kind": "report", "name": "r", "content": "c" * 64, "inputs": {"images": leaf, "tokenizer": tokenizer}}
    return EvaluationResult(name, metrics, counts, shown, history, lineage, [TRAIN, COMMAND])


@pytest.fixture(scope="session")
def evaluation_html() -> str:
    """The page of one tokenizer."""
    return page.render(evaluation_page(evaluated()))


@pytest.fixture(scope="session")
def comparison_html() -> str:
    """The page of two tokenizers on two sets of images."""
    names = list(enumerate(("lc", "fc")))
    several = [evaluated(name, seed, images) for images in ("photos", "faces") for seed, name in names]
    return page.render(comparison_page(several, "lc and fc"))
