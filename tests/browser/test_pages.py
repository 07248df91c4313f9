"""Report pages in a browser: by mouse, touch and keyboard, on phone and desktop, dark and light."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe.reports import page, training
from vqpipe.reports.benchmark import benchmark_page
from vqpipe.reports.pictures import ImagePair, contact_sheet, error_pictures, to_png
from vqpipe.reports.training import TrainingRun, training_page

Open = Callable[..., Any]
FILLED = "() => [...document.querySelectorAll('.card')].every((card) => card.querySelector('.slide'))"
DESKTOP = {"viewport": {"width": 1440, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}

# The contrast of every text with its background (WCAG 2, transparent colors blended), lowest first.
CONTRASTS = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => rgb.slice(0, 3)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (node) => {
    if (!node) return [255, 255, 255];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own : over(own, under(node.parentElement));
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || !node.checkVisibility() || node.closest("script, style, dialog:not([open])")) continue;
    const style = getComputedStyle(node), ground = under(node);
    const ink = over(parse(node.namespaceURI.endsWith("svg") ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    found.push({ text: text.slice(0, 30), contrast: (a + 0.05) / (b + 0.05) });
  }
  return found.sort((a, b) => a.contrast - b.contrast);
}"""


def screenshot(where: Any) -> np.ndarray:
    """A screenshot of an element without its border and the labels at the bottom: int[H, W, 3]."""
    pixels = np.asarray(Image.open(io.BytesIO(where.screenshot())).convert("RGB")).astype(int)
    return pixels[8 : -pixels.shape[0] // 4, 8:-8]


def reddish(pixels: np.ndarray) -> np.ndarray:
    """Where the original (more red than blue) is visible rather than its reconstruction, in one row: bool[W]."""
    row = pixels[pixels.shape[0] // 4]
    return row[:, 0] > row[:, 2]


def all_images_loaded(opened: Any) -> bool:
    script = "async () => { await Promise.all([...document.images].filter((i) => i.src).map((i) => i.decode())); "
    script += "return [...document.images].filter((i) => i.src).every((i) => i.naturalWidth > 0); }"
    return bool(opened.page.evaluate(script))


def overflow(opened: Any) -> int:
    """Pixels by which the page is wider than its window."""
    return int(opened.page.evaluate("() => document.documentElement.scrollWidth - innerWidth"))


def test_the_slider_moves_by_mouse_and_keys(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, **DESKTOP).page
    slide = view.locator(".slide").first
    slide.scroll_into_view_if_needed()
    start = reddish(screenshot(slide))
    assert 0.4 < start.mean() < 0.6
    assert start[: len(start) // 3].all()
    assert not start[-len(start) // 4 :].any()

    box = slide.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    view.mouse.down()
    view.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    view.mouse.up()
    assert slide.get_attribute("aria-valuenow") == "80"
    assert 0.75 < reddish(screenshot(slide)).mean() < 0.85
    assert not view.locator("dialog[open]").count()  # a drag is no click

    slide.focus()
    for key, value in (("ArrowLeft", "78"), ("Home", "0"), ("ArrowRight", "2"), ("PageUp", "12"), ("End", "100")):
        view.keyboard.press(key)
        assert slide.get_attribute("aria-valuenow") == value
    assert reddish(screenshot(slide)).all()
    assert "100 % original" in slide.get_attribute("aria-valuetext")
    view.keyboard.press("Home")
    assert not reddish(screenshot(slide)).any()


@pytest.mark.slow
def test_the_error_map_replaces_the_reconstruction(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, **DESKTOP).page
    slides, gallery = view.locator(".slide"), view.locator(".gallery").first
    slides.first.press("Home")
    before = screenshot(slides.first)
    view.locator(".card .version[data-label=error]").nth(1).click()  # of the second card alone
    assert np.array_equal(screenshot(slides.first), before)
    gallery.locator(".choices button", has_text="error").click()
    assert abs(screenshot(slides.first) - before).mean() > 20
    assert gallery.locator(".version[aria-pressed=true]").count() == 3
    assert gallery.locator(".version[data-label=error][aria-pressed=true]").count() == 3
    gallery.locator(".choices button", has_text="reconstruction").click()
    assert np.array_equal(screenshot(slides.first), before)


def test_the_large_view_opens_zooms_navigates_and_closes_by_keys(open_page: Open, evaluation_html: str) -> None:
    opened = open_page(evaluation_html, **DESKTOP)
    view, large = opened.page, opened.page.locator("dialog.large")
    first = view.locator(".slide").first
    first.focus()
    view.keyboard.press("Enter")
    assert large.get_attribute("open") is not None
    what, scale, sheet = large.locator(".what"), large.locator(".scale"), large.locator(".sheet")
    assert what.inner_text() == "meadow · 12.5 dB"
    fitted = scale.inner_text()
    view.keyboard.press("1")
    assert scale.inner_text() == "100 %"
    assert sheet.bounding_box()["width"] == 64
    view.keyboard.press("+")
    assert scale.inner_text() == "150 %"
    assert sheet.evaluate("(node) => getComputedStyle(node.querySelector('.after')).imageRendering") == "pixelated"
    view.keyboard.press("-")
    view.keyboard.press("-")
    assert sheet.evaluate("(node) => getComputedStyle(node.querySelector('.after')).imageRendering") == "auto"
    left = sheet.bounding_box()["x"]
    view.keyboard.press("Shift+ArrowLeft")
    assert sheet.bounding_box()["x"] == left + 60
    view.keyboard.press("0")
    assert scale.inner_text() == fitted

    view.keyboard.press("ArrowRight")
    assert what.inner_text().startswith("harbour")
    view.keyboard.press("ArrowLeft")
    view.keyboard.press("ArrowLeft")
    assert what.inner_text().startswith("stairs")  # wraps around within its section

    field = large.locator(".field")
    middle = slice(200, 300)
    view.keyboard.press(" ")  # error
    view.keyboard.press(" ")  # the original alone
    assert large.locator(".choices button[aria-pressed=true]").inner_text() == "original"
    shown = screenshot(field)[middle]
    assert (shown[..., 0] > shown[..., 2])[:, 500:900].all()
    view.keyboard.press(" ")
    handle = large.locator(".handle")
    handle.press("Home")
    assert handle.get_attribute("aria-valuenow") == "0"
    shown = screenshot(field)[middle]
    assert (shown[..., 0] < shown[..., 2])[:, 500:900].all()

    view.keyboard.press("Escape")
    assert large.get_attribute("open") is None
    focused = "(document.activeElement.getAttribute('aria-label') || '').startsWith('stairs')"
    view.wait_for_function(f"() => {focused}")  # the page moves the focus after the dialog has closed
    assert opened.messages == []


@pytest.mark.slow
def test_the_large_view_pans_zooms_and_slides_by_mouse(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, **DESKTOP).page
    view.locator(".slide").nth(1).click()
    sheet, handle = view.locator(".sheet"), view.locator(".handle")
    assert view.locator(".what").inner_text().startswith("harbour")
    before, grip = sheet.bounding_box(), handle.bounding_box()
    view.mouse.move(300, 400)
    view.mouse.down()
    view.mouse.move(340, 430, steps=3)
    view.mouse.up()
    after = sheet.bounding_box()
    assert (after["x"] - before["x"], after["y"] - before["y"]) == pytest.approx((40, 30), abs=0.1)
    view.mouse.wheel(0, -100)
    assert sheet.bounding_box()["width"] == pytest.approx(before["width"] * np.exp(0.25), rel=0.01)
    view.keyboard.press("0")
    view.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    view.mouse.down()
    view.mouse.move(before["x"] + before["width"] / 4, 400, steps=3)
    view.mouse.up()
    assert handle.get_attribute("aria-valuenow") == "25"
    view.locator("dialog .close").click()
    assert not view.locator("dialog[open]").count()


def test_a_phone_shows_the_page_within_its_width_and_slides_by_touch(open_page: Open, evaluation_html: str) -> None:
    opened = open_page(evaluation_html, **PHONE)
    view = opened.page
    assert overflow(opened) == 0
    slide = view.locator(".slide").first
    slide.scroll_into_view_if_needed()
    box = slide.bounding_box()
    finger = view.context.new_cdp_session(view)
    for kind, share in (("touchStart", 0.5), *(("touchMove", to) for to in (0.4, 0.3, 0.2)), ("touchEnd", None)):
        points = [] if share is None else [{"x": box["x"] + box["width"] * share, "y": box["y"] + box["height"] / 2}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert slide.get_attribute("aria-valuenow") == "20"
    assert not view.locator("dialog[open]").count()
    slide.tap()
    assert view.locator("dialog[open]").count() == 1
    for each in view.locator("dialog button:visible").all():
        place = each.bounding_box()
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= 375
    assert (opened.messages, opened.requests[1:]) == ([], [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(open_page: Open, evaluation_html: str, scheme: str) -> None:
    opened = open_page(evaluation_html, color_scheme=scheme, **DESKTOP)
    texts = opened.page.evaluate(CONTRASTS)
    assert len(texts) > 100
    assert texts[0]["contrast"] >= 4.5, texts[:5]
    ground = opened.page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")
    assert (sum(map(int, ground)) < 200) == (scheme == "dark")


def test_samples_have_128_pixels_and_fill_the_page(open_page: Open) -> None:
    sheet = contact_sheet(torch.randint(0, 255, (16, 3, 32, 32), dtype=torch.uint8), 8)
    html = page.render(page.ReportPage("s", "", [page.Maps("Samples", [page.Map("n", sheet, "h", "samples", 8)])]))
    for how, columns in ((DESKTOP, 8), (PHONE, 2)):
        opened = open_page(html, **how)
        boxes = [cell.bounding_box() for cell in opened.page.locator(".cells svg").all()]
        assert len(boxes) == 16
        assert all(box["width"] == pytest.approx(box["height"], abs=1) and box["width"] >= 128 for box in boxes)
        assert len({box["x"] for box in boxes}) == columns
        assert overflow(opened) == 0


def test_each_image_of_a_sheet_is_shown_alone(open_page: Open) -> None:
    colors = torch.tensor([[255, 0, 0], [0, 160, 0], [0, 0, 255]], dtype=torch.uint8)
    sheet = contact_sheet(colors[:, :, None, None].expand(-1, -1, 32, 32), 3)
    html = page.render(page.ReportPage("s", "", [page.Maps("Samples", [page.Map("n", sheet, "h", "samples", 3)])]))
    view = open_page(html, **DESKTOP).page
    for cell, color in zip(view.locator(".cells svg").all(), colors.tolist(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(cell.screenshot())).convert("RGB"))[4:-4, 4:-4]
        assert np.abs(pixels.astype(int) - color).max() <= 2


def test_no_tile_breaks_its_number(open_page: Open) -> None:
    numbers = [page.Number(f"n{number}", "1.1e-6", "images/s", "a note") for number in range(5)]
    view = open_page(page.render(page.ReportPage("a/long:name", "", [page.Numbers("n", numbers)])), **PHONE).page
    heights = {number.bounding_box()["height"] for number in view.locator(".numbers b").all()}
    assert max(heights) < 45  # one line
    assert view.locator("h1 wbr").count() == 2


def test_a_wide_table_on_a_phone_keeps_its_first_column_and_fills_its_tiles(open_page: Open) -> None:
    names = [f"column {number}" for number in range(12)]
    numbers = [page.Number(f"n{number}", "1") for number in range(5)]
    table = page.Table("t", ["tokenizer", *names], [["lc", *names]])
    html = page.render(page.ReportPage("s", "", [page.Numbers("n", numbers), table]))
    opened = open_page(html, **PHONE)
    view = opened.page
    view.evaluate("() => { document.querySelector('.scroll').scrollLeft = 300; }")
    for cell in ("thead th", "tbody th"):
        assert view.locator(cell).first.bounding_box()["x"] == view.locator(".scroll").bounding_box()["x"]
    tiles = [tile.bounding_box() for tile in view.locator(".numbers > div").all()]
    right = max(tile["x"] + tile["width"] for tile in tiles)
    rows = {tile["y"]: 0.0 for tile in tiles}
    for tile in tiles:
        rows[tile["y"]] = max(rows[tile["y"]], tile["x"] + tile["width"])
    assert all(end == pytest.approx(right, abs=1) for end in rows.values())  # no row ends with a hole


def test_no_picture_is_black_before_the_script_has_run_or_without_it(open_page: Open, evaluation_html: str) -> None:
    opened = open_page(evaluation_html, **DESKTOP)
    script = "(f) => { f.replaceChildren(); return getComputedStyle(f).backgroundColor; }"
    ground = opened.page.locator(".frame").first.evaluate(script)  # as before its pictures are there
    assert ground == "rgb(227, 224, 218)"
    without = open_page(evaluation_html, java_script_enabled=False, **DESKTOP).page
    assert without.locator(".frame").count() == 0
    assert without.locator(".triple img:visible").count() == 15


def test_the_page_makes_no_requests_and_all_images_load(open_page: Open, evaluation_html: str) -> None:
    opened = open_page(evaluation_html, **DESKTOP)
    assert all_images_loaded(opened)
    assert opened.page.locator(".slide .after").count() == 5
    assert [address for address in opened.requests if not address.startswith("data:")] == [opened.page.url]
    assert opened.messages == []
    sections = opened.page.locator("h2").all_inner_texts()
    assert sections.index("The worst images") < sections.index("The best images")


def test_a_command_is_copied_with_and_without_clipboard_access(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, **DESKTOP).page
    read = "() => navigator.clipboard.readText()"
    buttons = view.locator(".copy")
    buttons.nth(1).click()
    buttons.nth(1).filter(has_text="Copied").wait_for()
    assert view.evaluate(read) == "vqpipe eval --images 'my photos' --tokenizer lc --out DIR"
    view.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    buttons.nth(0).click()
    buttons.nth(0).filter(has_text="Copied").wait_for()
    assert view.evaluate(read).startswith("vqpipe train --preset mgvq-f16-g4")


@pytest.mark.slow
def test_the_color_theme_can_be_chosen(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, color_scheme="light", **DESKTOP).page
    grounds = []
    for _ in range(3):
        grounds.append(view.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        view.locator(".theme").click()
    assert grounds[0] == grounds[2] != grounds[1]
    assert view.locator(".theme").inner_text() == "Theme: auto"


@pytest.mark.slow
def test_print_and_reduced_motion(open_page: Open, evaluation_html: str) -> None:
    view = open_page(evaluation_html, color_scheme="dark", reduced_motion="reduce", **DESKTOP).page
    assert view.evaluate("() => getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    view.emulate_media(media="print")
    assert view.locator(".frame:visible, .copy:visible, nav:visible, .hint:visible").count() == 0
    assert view.locator(".triple img:visible").count() == 15
    assert view.evaluate("() => getComputedStyle(document.body).color") == "rgb(27, 31, 39)"


@pytest.mark.slow
@pytest.mark.parametrize("how", [DESKTOP, PHONE])
def test_a_comparison_is_accessible_and_makes_no_requests(
    open_page: Open, comparison_html: str, how: dict[str, Any]
) -> None:
    for scheme in ("light", "dark"):
        opened = open_page(comparison_html, color_scheme=scheme, **how)
        assert all_images_loaded(opened)
        assert overflow(opened) == 0
        assert (opened.messages, opened.requests[1:]) == ([], [])
        assert opened.page.evaluate(CONTRASTS)[0]["contrast"] >= 4.5
    view = opened.page
    slide = view.locator(".slide").first
    slide.press("Home")
    before = screenshot(slide)
    view.locator(".gallery").first.locator(".choices button", has_text="fc").click()
    assert view.locator(".gallery").first.locator(".version[data-label=fc][aria-pressed=true]").count() == 5
    assert (screenshot(slide) - before)[..., 1].mean() > 30  # greener


@pytest.mark.slow
def test_a_training_run_and_a_benchmark_are_accessible_and_make_no_requests(open_page: Open) -> None:
    rows = [{"step": i, "images_seen": 8 * i, "loss/total": 1 / i, "psnr": 15.0 + i} for i in (1, 2, 3)]
    image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)
    run = TrainingRun(
        name="run",
        description="vq quantizer, 64 codes, downsample factor 2.",
        step=3,
        steps=9,
        rows=rows,
        shown=[ImagePair("noise", to_png(image), to_png(image.flip(1)), 9.0)],
        counts=torch.randint(0, 3, (1, 64)),
        command="vqpipe train",
    )
    method = {"exact": True, "version": "1", "rounds": 3, "note": "float32", "same_ids": 1.0, "extra": {}}
    times = {"wall_min_ms": 9.0, "cpu_ms": 12.0, "ratio_cpu": 1.0, "peak_mb": 3.0, "rate": 1000.0}
    methods = [
        {"name": name, "ours": name == "ours", "wall_ms": 10.0 + i, "ratio_wall": 1.0 + i} | method | times
        for i, name in enumerate(("ours", "naive expansion"))
    ]
    case: dict[str, Any] = {"title": "search 4,096 codes", "unit": "vectors", "facts": {}, "load": 0.5}
    case |= {"rows": methods, "not_run": {"faiss": "not installed"}}
    measured = {
        "subjects": {"search": [case]},
        "settings": {"quick": False},
        "machine": {"cpu": "a processor", "threads": 1, "cpus": 2, "instructions": "avx2"},
        "versions": {"torch": "2"},
    }
    for report in (training_page(run), benchmark_page(measured, "vqpipe bench")):
        for how in (DESKTOP, PHONE):
            opened = open_page(page.render(report), color_scheme="dark", **how)
            assert all_images_loaded(opened)
            assert overflow(opened) == 0
            assert (opened.messages, opened.requests[1:]) == ([], [])
            assert opened.page.evaluate(CONTRASTS)[0]["contrast"] >= 4.5


def evaluate(view: Any, script: str) -> Any:
    """`view.evaluate`, again if the page reloads itself meanwhile."""
    while True:
        try:
            return view.evaluate(script)
        except Exception as error:  # playwright's, which may not be installed
            if "context was destroyed" not in str(error):
                raise


def test_page_of_a_running_job_reloads_itself_and_keeps_the_readers_place(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RELOAD_SECONDS", 1)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8, generator=generator)
    pair = ImagePair("noise", to_png(image), to_png(image.flip(1)), 9.0)
    settings = {"train": {f"setting_{number}": number for number in range(90)}}

    def html(step: int) -> str:
        rows = [{"step": each, "images_seen": 8 * each, "psnr": 10.0 + each} for each in range(1, step + 1)]
        shown = [pair] if step > 1 else []  # later pages have more above the reader's place
        run = TrainingRun(name="lc", description="", step=step, steps=9, rows=rows, shown=shown, settings=settings)
        return page.render(training_page(run))

    view = open_page(html(1), **DESKTOP).page
    view.locator("summary", has_text="Show").click()
    evaluate(view, "() => scrollTo(0, document.querySelector('table').getBoundingClientRect().top + scrollY + 200)")
    before = evaluate(view, "() => document.querySelector('table').getBoundingClientRect().top")
    dark = "document.documentElement.dataset.theme === 'dark'"
    evaluate(view, f"() => {{ if (!({dark})) document.querySelector('.theme').click(); }}")
    (tmp_path / "report.html").write_text(html(2), encoding="utf-8")
    view.wait_for_function("() => document.body.textContent.includes('Step 2 of 9')")
    view.wait_for_function(FILLED)
    assert evaluate(view, "() => document.querySelector('table').getBoundingClientRect().top") == pytest.approx(
        before, abs=2
    )
    assert evaluate(view, f"() => {dark}")

    evaluate(view, "() => document.querySelector('.card .version[data-label=error]').click()")
    evaluate(view, "() => document.querySelector('.slide').closest('.card').card.slideTo(80)")
    (tmp_path / "report.html").write_text(html(3), encoding="utf-8")
    view.wait_for_function("() => document.body.textContent.includes('Step 3 of 9')")
    view.wait_for_function(FILLED)
    assert view.locator(".card .version[aria-pressed=true]").get_attribute("data-label") == "error"
    assert view.locator(".slide").get_attribute("aria-valuenow") == "80"

    # The run ends: its folder is renamed.
    published = tmp_path.parent / "lc"
    published.mkdir()
    (published / "report.html").write_text(html(9), encoding="utf-8")
    (published / "manifest.json").write_text('{"schema": 1, "kind": "tokenizer"}', encoding="utf-8")
    (tmp_path / "report.html").unlink()
    view.wait_for_function("() => document.body.textContent.includes('Step 9 of 9')")
    assert view.url == (published / "report.html").as_uri()
    assert view.locator("details[open] table").count() == 1
    evaluate(view, "() => { window.mark = 1; }")
    view.wait_for_timeout(1500)
    assert evaluate(view, "() => window.mark") == 1  # it does not reload


def test_page_of_a_running_job_waits_for_its_reader(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RELOAD_SECONDS", 1)
    run = TrainingRun(name="lc", description="", step=1, steps=9, rows=[], command="vqpipe train")
    view = open_page(page.render(training_page(run)), **DESKTOP).page
    evaluate(view, "() => { window.mark = 1; getSelection().selectAllChildren(document.querySelector('code')); }")
    view.wait_for_timeout(1500)
    assert evaluate(view, "() => window.mark") == 1
    evaluate(view, "() => getSelection().removeAllRanges()")
    view.wait_for_function("() => window.mark === undefined")


@pytest.mark.slow
def test_sixty_pictures_are_shown(open_page: Open) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (60, 3, 128, 128), dtype=torch.uint8, generator=generator)
    shown = [ImagePair(f"noise {i}", to_png(image), to_png(image.roll(1, 1)), 10.0) for i, image in enumerate(noise)]
    html = page.render(page.ReportPage("many", "", [page.Pictures("Noise", error_pictures(shown))]))
    opened = open_page(html, **DESKTOP)
    assert all_images_loaded(opened)
    assert opened.page.locator(".slide").count() == 60
    assert json.dumps(opened.messages) == "[]"
