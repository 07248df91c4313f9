"""`vqpipe compare`: reports on the same images side by side, others refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.compare import compare
from stages.evaluate import evaluate
from vqpipe.errors import ArtifactError, ConfigError

HISTORY = [
    {"step": i, "images_seen": 8 * i, "loss/total": 1 / i, "psnr": 15.0 + i, "utilization": i / 10} for i in (1, 2, 3)
]


@pytest.fixture
def make_report(tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make(name, seed)` -> the report of a tokenizer of that name."""

    def make(name: str, seed: int, **options: object) -> Path:
        path = tmp_path / name
        tokenizer = path if path.exists() else tiny_tokenizer(name, seed, history=HISTORY)
        out = tmp_path / f"report-{name}-{len(options)}"
        evaluate(images=[str(picture_folder)], tokenizer=tokenizer, out=out, device="cpu", **options)  # type: ignore[arg-type]
        return out

    return make


def test_the_page_shows_the_same_pictures_for_both_and_marks_the_better_number(
    make_report: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [make_report("first", 0), make_report("second", 1)]
    capsys.readouterr()
    compare(reports, out=tmp_path / "compared")
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "compared")
    numbers = json.loads((tmp_path / "compared" / "metrics.json").read_text(encoding="utf-8"))["compared"]
    assert list(numbers) == ["first", "second"]
    for metrics in numbers.values():
        assert f"{metrics['psnr']:.2f}" in said.err
    html = (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")
    best = max(metrics["psnr"] for metrics in numbers.values())
    assert f'<td class="best">{best:.2f}</td>' in html
    assert html.count('data-label="first"') == html.count('data-label="second"') == 10
    assert "first ends at 0.3333, second ends at 0.3333" in html

    compare(reports, out=tmp_path / "compared")
    assert "already published" in capsys.readouterr().err


def test_a_corrected_table_of_a_paper_is_another_request(
    make_report: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports, table, out = (
        [make_report("first", 0), make_report("second", 1)],
        tmp_path / "t.toml",
        tmp_path / "compared",
    )
    content = 'title = "Table 1"\nprotocol = "adm"\ncolumns = ["psnr"]\nrows = [["first", "First", 20.5]]\n'
    table.write_text(content, encoding="utf-8")
    capsys.readouterr()
    compare(reports, out=out, published=[table])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines[lines.index(["row", "paper", "ours"]) - 1] == ["PSNR,", "dB"]
    compare(reports, out=out, published=[table])
    table.write_text(content.replace("20.5", "21.5"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="made with another table-1"):
        compare(reports, out=out, published=[table])


def test_groups_and_continuous_latents_are_compared_with_other_tokenizers(
    make_report: Callable[..., Path],
    tiny_tokenizer: Callable[..., Path],
    tiny_vae: Path,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    group = {"kind": "vq", "codebook_size": 64, "code_dim": 4}
    grouped = tiny_tokenizer("grouped", quantizer={"kind": "multi_group", "num_groups": 2, "group": group})
    huge = tiny_tokenizer("huge", quantizer={"kind": "lfq", "code_dim": 36})
    reports = [make_report("plain", 0)]
    for path in (grouped, huge, tiny_vae):
        reports.append(tmp_path / f"report-{path.name}")
        evaluate(images=[str(picture_folder)], tokenizer=path, out=reports[-1], image_size="32", device="cpu")
    compare(reports, out=tmp_path / "compared")
    html = (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "compared" / "metrics.json").read_text(encoding="utf-8"))["compared"]
    bits = {name: metrics.get("bits_per_pixel") for name, metrics in numbers.items()}
    assert bits == {"plain": 1.5, "grouped": 3.0, "huge": 9.0, "tiny-vae": None}
    row = html.partition('<th scope="row">tiny-vae</th>')[2].partition("</tr>")[0]
    assert row.count("<td>–</td>") == 5
    assert "<td>2 x 64</td>" in html
    assert "<td>68,719,476,736</td>" in html
    assert f"tiny-vae {numbers['tiny-vae']['psnr']:.2f}: a dashed line" in html
    assert "tiny-vae: codes in use, utilization per group, perplexity per group, bits per pixel" in html


@pytest.mark.parametrize(("option", "key"), [({"limit": 4}, "num_images"), ({"image_size": 16}, "image_size")])
def test_reports_on_other_images_are_refused_with_the_key_that_differs(
    make_report: Callable[..., Path], tmp_path: Path, option: dict[str, int], key: str
) -> None:
    whole, other = make_report("first", 0), make_report("second", 1, **option)
    with pytest.raises(ArtifactError, match=rf"report-first-0 and .*report-second-1 .* their {key} differs"):
        compare([whole, other], out=tmp_path / "compared")
    assert not (tmp_path / "compared").exists()


@pytest.mark.slow
def test_several_sets_make_one_table_with_a_column_each(
    make_report: Callable[..., Path], picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [make_report(name, seed) for seed, name in enumerate(("first", "second"))]
    reports += [make_report(name, seed, limit=4) for seed, name in enumerate(("first", "second"))]
    capsys.readouterr()
    compare(reports, out=tmp_path / "compared")
    said = capsys.readouterr().err
    assert "10 images of pictures, 32 px, 10 images at 32 px, protocol adm" in said
    numbers = json.loads((tmp_path / "compared" / "metrics.json").read_text(encoding="utf-8"))["compared"]
    assert [metrics["num_images"] for metrics in numbers.values()] == [10, 10, 4, 4]
    assert len({name.partition(", on ")[0] for name in numbers}) == 2
    html = (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")
    across = html.partition("<table>")[2].partition("</table>")[0]
    for name in ("first", "second"):
        row = across.partition(f'<th scope="row">{name}</th>')[2].partition("</tr>")[0]
        values = [metrics["psnr"] for key, metrics in numbers.items() if key.startswith(name)]
        assert [f"{value:.2f}" in row for value in values] == [True, True]


def test_the_same_number_of_other_images_is_refused(
    make_report: Callable[..., Path], picture_folder: Path, tmp_path: Path
) -> None:
    whole = make_report("first", 0)
    (picture_folder / "drawn-0.png").write_bytes((picture_folder / "drawn-1.png").read_bytes())
    with pytest.raises(ArtifactError, match="their reference differs"):
        compare([whole, make_report("second", 1)], out=tmp_path / "compared")


def test_a_single_report_or_a_comparison_is_refused(make_report: Callable[..., Path], tmp_path: Path) -> None:
    report = make_report("first", 0)
    with pytest.raises(ConfigError, match="at least two"):
        compare([report], out=tmp_path / "compared")
    compare([report, report], out=tmp_path / "twice")
    with pytest.raises(ArtifactError, match="is a report, but not one of vqpipe eval"):
        compare([report, tmp_path / "twice"], out=tmp_path / "compared")
