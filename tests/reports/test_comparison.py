"""Which numbers share a table, and under what names."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from vqpipe.errors import ArtifactError
from vqpipe.reports import page
from vqpipe.reports.comparison import (
    check_comparable,
    comparison_page,
    distinct,
    facts_of,
    groups_of,
    measure_table,
    metrics_by_name,
    paper_tables,
    rank_cell,
)
from vqpipe.reports.evaluation import (
    MEASURES,
    EvaluationResult,
    by_protocol,
    convention_of,
    measures_of,
    size_in_words,
    value_of,
)
from vqpipe.reports.evaluation_page import evaluation_page

TOKENIZER = {"quantizer": "vq", "codebook_size": 4, "num_groups": 1, "downsample_factor": 8}
RAW = {
    "psnr": 27.5,
    "rfid": 9.0,
    "kid": {"mean": 0.01, "std": 0.002},
    "prc": {"precision": 0.75, "recall": 0.5, "k": 3},
    "reference": "the raw images",
    "reference_digest": "linear",
    "resize": "PIL bicubic",
    "conventions": {"psnr": "psnr_y_float: studio luma"},
}


def evaluated(
    name: str = "lc", images: str = "photos", protocols: dict[str, Any] | None = None, **more: Any
) -> EvaluationResult:
    metrics = {
        "protocol": "adm",
        "num_images": 50,
        "image_size": 256,
        "reference": images,
        "psnr": 21.0,
        "rfid": {},
        "utilization": 0.5,
        "utilization_per_group": [0.5],
        "perplexity_per_group": [2.0],
        "bits_per_pixel": 0.1,
        "num_tokens_per_image": 16,
        "not_computed": {},
        "tokenizer": TOKENIZER,
        "psnr_y": 24.0,
    } | more
    if protocols is not None:
        metrics["protocols"] = protocols
    leaf = {"kind": "data", "name": images, "content": images, "inputs": {}}
    lineage = {
        "kind": "report",
        "name": "r",
        "content": "",
        "inputs": {"images": leaf, "tokenizer": {"kind": "tokenizer", "name": name, "content": name, "inputs": {}}},
    }
    return EvaluationResult(name, metrics, torch.tensor([[5, 3, 0, 0]]), lineage=lineage, commands=["vqpipe eval"])


def test_a_protocol_has_only_its_own_numbers() -> None:
    both = evaluated(protocols={"adm": {"psnr": 21.0}, "cleanfid-rawval": RAW}, rfid={"adm": 3.0}, lpips_alex=0.2)
    adm, raw = by_protocol(both.metrics)
    values = {key: (value_of(adm, key), value_of(raw, key)) for key in ("psnr", "rfid", "kid")}
    assert values == {"psnr": (21.0, 27.5), "rfid": (3.0, 9.0), "kid": (None, 0.01)}
    for key in ("psnr_y", "lpips_alex"):  # of the first protocol alone
        assert (value_of(adm, key), value_of(raw, key)) == (both.metrics[key], None)
    assert (value_of(raw, "precision"), value_of(raw, "recall"), raw["reference"]) == (0.75, 0.5, "linear")
    by_key = {measure.key: measure for measure in measures_of(raw)}
    assert convention_of(by_key["psnr"], raw) == "studio luma"
    assert convention_of(by_key["rfid"], raw) == "against the raw images; PIL bicubic"
    assert value_of(raw, "utilization") == 0.5
    of_codes = {"utilization", "perplexity", "bits_per_pixel", "bits_per_pixel_entropy"}
    numbers = {measure.key: 0.5 for measure in MEASURES if measure.key not in ("rfid", *of_codes)}
    _, other = by_protocol(evaluated(protocols={"adm": {}, "cleanfid-rawval": {}}, **numbers).metrics)
    assert {key: value_of(other, key) for key in numbers} == dict.fromkeys(numbers)


def test_a_report_of_one_protocol_has_all_numbers() -> None:
    (view,) = by_protocol(evaluated(rfid={"adm": 2.5}).metrics)
    assert (view["protocol"], value_of(view, "rfid"), view["reference"]) == ("adm", 2.5, "photos")


@pytest.mark.parametrize(
    ("size", "words"), [(256, "256 px"), ("2560x1440", "2560 x 1440 px"), ("native", "their own size")]
)
def test_image_sizes_as_text(size: int | str, words: str) -> None:
    assert size_in_words({"image_size": size}) == words


def test_pages_say_once_what_the_protocol_is() -> None:
    both = [evaluated("a"), evaluated("b")]
    for shown in (evaluation_page(both[0]), comparison_page(both, "a and b")):
        assert shown.subtitle.endswith("Protocol adm: ADM's crop and rFID.")


def test_numbers_of_two_protocols_never_share_a_column() -> None:
    both = {"adm": {"psnr": 21.0}, "cleanfid-rawval": RAW}
    html = page.render(comparison_page([evaluated("a", protocols=both), evaluated("b", protocols=both)], "a and b"))
    tables = [part.partition("</table>")[0] for part in html.split("<table>")[1:]]
    assert [("21.00" in table, "27.50" in table) for table in tables[:2]] == [(True, False), (False, True)]
    assert not [table for table in tables if "21.00" in table and "27.50" in table]
    single = page.render(evaluation_page(evaluated("a", protocols=both)))
    beside = next(part for part in single.split("<table>") if "here, adm" in part).partition("</table>")[0]
    row = beside.partition("PSNR, dB</th>")[2].partition("</tr>")[0]
    assert row.index("21.00") < row.index("27.50")  # in the columns of their protocols
    assert beside.index("here, adm") < beside.index("here, cleanfid-rawval")


def test_reports_are_grouped_and_sets_have_distinct_names() -> None:
    several = [evaluated("a"), evaluated("b"), evaluated("a", "faces"), evaluated("b", "faces"), evaluated("c")]
    check_comparable(several, list("abcde"))
    groups = groups_of(several)
    assert [(group.images, [each.name for each in group.members]) for group in groups] == [
        ("photos", ["a", "b", "c"]),
        ("faces", ["a", "b"]),
    ]
    resized = groups_of([evaluated("a"), evaluated("a", image_size=512, reference="larger")])
    assert [group.images for group in resized] == ["photos, 256 px", "photos, 512 px"]
    fewer = groups_of([evaluated("a"), evaluated("a", num_images=9, reference="few")])
    assert [group.images for group in fewer] == ["photos, 256 px, 50 images", "photos, 256 px, 9 images"]


def test_sets_of_other_random_classes_have_distinct_names() -> None:
    drawn = [
        {"classes": classes, "num_classes": 5, "seed": seed} for seed, classes in enumerate((["a", "b"], ["b", "c"]))
    ]
    several = [
        evaluated(name, random_classes=each, reference=str(each["seed"])) for each in drawn for name in ("one", "two")
    ]
    names = ["photos (2 of 5 classes, seed 0)", "photos (2 of 5 classes, seed 1)"]
    assert [group.images for group in groups_of(several)] == names
    assert list(metrics_by_name(several)) == [f"{name}, on {where}" for where in names for name in ("one", "two")]
    assert comparison_page(several, "two").subtitle.startswith("On 2 sets of images.")


def test_equal_titles_of_groups_are_numbered() -> None:
    other_pixels = groups_of(
        [evaluated("a"), evaluated("b"), evaluated("a", reference="x"), evaluated("b", reference="x")]
    )
    assert other_pixels[0].title == other_pixels[1].title
    title = other_pixels[0].title
    assert facts_of(other_pixels) == {"groups": {f"1: {title}": ["a", "b"], f"2: {title}": ["a", "b"]}}


def test_a_report_comparable_with_none_is_refused_with_the_first_differing_key() -> None:
    message = r"one and two cannot be compared: their reference differs \(.*\)\. Evaluate both on the same images"
    with pytest.raises(ArtifactError, match=message):
        check_comparable([evaluated("a"), evaluated("b", "faces")], ["one", "two"])
    with pytest.raises(ArtifactError, match="one and three cannot be compared: their reference differs"):
        check_comparable([evaluated("a"), evaluated("b"), evaluated("c", "faces")], ["one", "two", "three"])
    check_comparable([evaluated("a"), evaluated("a", "faces")], ["one", "two"])  # the tokenizer is shared


def test_several_sets_make_one_table_with_the_best_of_each_column_marked() -> None:
    several = [evaluated("a", rfid={"adm": 4.0}), evaluated("b", rfid={"adm": 3.0}, psnr=22.0)]
    several += [evaluated("a", "faces", rfid={"adm": 8.0}, psnr=25.0)]
    html = page.render(comparison_page(several, "a and b"))
    table = html.partition("<table>")[2].partition("</table>")[0]
    assert '<th scope="colgroup" colspan="2">photos</th><th scope="colgroup" colspan="2">faces</th>' in table
    rows = [row.partition("</tr>")[0] for row in table.partition("<tbody>")[2].split("<tr>")[1:]]
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows]
    assert cells == [["4.00", "21.00", "8.00", "25.00", "1.5", "1.5"], ["3.00", "22.00", "–", "–", "–", "–"]]
    assert '<th scope="colgroup" colspan="2">mean rank</th>' in table
    assert rows[1].count('class="best"') == 2
    assert rows[0].count('class="best"') == 0


def test_equal_numbers_share_the_better_rank() -> None:
    sets = groups_of([evaluated("a"), evaluated("b"), evaluated("c", psnr=20.0)])
    assert [rank_cell(name, sets, MEASURES[0]) for name in "abc"] == ["1.0", "1.0", "3.0"]


def test_the_table_of_papers_has_the_numbers_of_the_paper() -> None:
    commands = ["vqpipe train --preset vqgan-lc-f16-100k --images photos --steps 9 --out a"]
    (table,) = paper_tables([replace(evaluated("a"), commands=commands), evaluated("b")])
    assert isinstance(table, page.Table)
    labels = ["rFID", "PSNR, dB", "SSIM", "LPIPS", "codes in use, %"]
    assert table.header == ["tokenizer", "row", *labels, "changed in this run"]
    assert table.rows[0][2:] == ["2.62", "23.80", "0.589", "0.120", "99.9", "--steps 9"]
    assert len(table.rows) == 1


def test_different_tokenizers_have_distinct_names() -> None:
    same = [evaluated("a"), evaluated("a")]
    by_report = distinct(same, ["x", "y"])
    assert [each.name for each in by_report] == ["x", "y"]
    assert measure_table(groups_of(by_report)[0], MEASURES[:1], "").header[0] == "report"
    assert [each.name for each in distinct(same, ["x", "x"])] == ["1: a", "2: a"]
    two_sets = [evaluated("a"), evaluated("b"), evaluated("a", "faces")]
    by_tokenizer = distinct(two_sets, ["x", "y", "z"])
    assert [each.name for each in by_tokenizer] == ["a", "b", "a"]
    assert measure_table(groups_of(by_tokenizer)[0], MEASURES[:1], "").header[0] == "tokenizer"


def test_capacity_is_given_where_a_tokenizer_has_groups() -> None:
    groups = {"num_groups": 4, "codebook_size": 8192}
    of_one = measure_table(groups_of([evaluated("a"), evaluated("b")])[0], MEASURES[:1], "")
    assert of_one.header == ["tokenizer", "codes", "PSNR, dB"]
    several = [evaluated("a"), evaluated("b", tokenizer=TOKENIZER | groups)]
    table = measure_table(groups_of(several)[0], MEASURES[:1], "")
    assert table.header == ["tokenizer", "codes", "capacity, bits", "PSNR, dB"]
    assert [row[2] for row in table.rows] == ["2.0", "52.0"]
