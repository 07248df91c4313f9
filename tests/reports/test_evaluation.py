from typing import Any

from vqpipe.reports.evaluation import CODE_MEASURES, MEASURES, OTHER_FORMULAS, number_rows, protocols_table

METRICS: dict[str, Any] = {
    "num_images": 5,
    "protocol": "adm",
    "protocols": {"adm": {"psnr": 21.5, "rfid": 3.25}},
    "rfid": {"adm": 3.25},
    "psnr": 21.5,
    "psnr_y": 23.0,
    "frechet": {"timm:vit": 12.0},
    "not_measured": {"psnr": {"count": 1}},
}


def test_rows_of_an_evaluation_are_its_numbers_with_those_of_the_extractor() -> None:
    rows = {label: (value, convention) for label, value, convention in number_rows(METRICS, OTHER_FORMULAS)}
    assert list(rows) == ["PSNR", "rFID", "Frechet, timm:vit"]
    assert {label for label, _, _ in number_rows(METRICS)} == {*rows, "PSNR of luma"}
    assert rows["PSNR"][0] == "21.50 dB"
    assert rows["PSNR"][1].endswith("; over 4 of 5 images")
    assert "crops" not in rows["rFID"][1]  # of cleanfid-rawval it is against whole images


def test_several_protocols_have_a_table() -> None:
    assert protocols_table(METRICS) is None
    raw = {"psnr": 21.0, "ssim": 0.5}
    table = protocols_table({**METRICS, "protocols": METRICS["protocols"] | {"cleanfid-rawval": raw}})
    assert table is not None
    assert table.header == ["own convention", "adm", "cleanfid-rawval"]
    assert table.rows == [["psnr", "21.5", "21"], ["ssim", "–", "0.5"], ["rfid", "3.25", "–"]]


def test_measures_of_the_option_metrics_are_among_the_numbers_of_each_protocol() -> None:
    adm = {"kid": {"mean": 0.25, "std": 0.5}, "prc": {"precision": 0.5, "recall": 0.75, "k": 3}}
    adm |= {"sfid": 4.5, "inception_score": {"mean": 9.0, "std": 1.0}}
    metrics = {**METRICS, "protocols": {"adm": adm, "cleanfid-rawval": {"sfid": 5.5}}}
    rows = {label: value for label, value, _ in number_rows(metrics)}
    expected = {"sFID": "4.50", "KID": "0.25000", "precision": "0.500", "recall": "0.750", "Inception Score": "9.0"}
    assert rows | expected == rows
    assert dict(number[:2] for number in number_rows({**metrics, "protocol": "cleanfid-rawval"}))["sFID"] == "5.50"
    table = protocols_table(metrics)
    assert table is not None
    assert table.rows[0] == ["sfid", "4.5", "5.5"]
    assert ["precision", "0.5", "–"] in table.rows


def test_distances_are_better_if_lower_and_numbers_of_codes_have_no_best() -> None:
    lower = {
        m.key for m in MEASURES if m.key.startswith(("lpips", "perceptual")) or m.key in ("fid", "rfid", "sfid", "kid")
    }
    expected = {m.key: None if m.key in CODE_MEASURES else m.key not in lower for m in MEASURES}
    assert {measure.key: measure.higher_is_better for measure in MEASURES} == expected
