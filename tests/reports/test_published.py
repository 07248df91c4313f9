"""Numbers of papers beside ours."""

from pathlib import Path

import pytest

from vqpipe.errors import ConfigError
from vqpipe.reports.published import OurNumbers, published_table, read_table

TABLE = """
title = "A paper, Table 1"
protocol = "adm"
columns = ["rfid", "psnr", "rfid@faces"]
rows = [
    ["", "another paper's", 5.0, "-", "-"],
    ["lc", "VQGAN-LC", 2.62, 23.8, 4.0],
]
"""
RUNS = Path(__file__).resolve().parents[2] / "stages" / "runs" / "published"


def written(folder: Path, text: str) -> Path:
    path = folder / "table.toml"
    path.write_text(text)
    return path


def test_each_printed_number_has_ours_beside_it_by_the_protocol_of_the_paper(tmp_path: Path) -> None:
    ours = OurNumbers()
    ours.add("cleanfid-matched", "photos", ("lc",), {"rfid": 1.0})  # another protocol: not shown
    ours.add("adm", "photos", ("lc",), {"rfid": 2.5, "psnr": 24.0})
    ours.add("adm", "faces", ("x", "faces-512-lc"), {"rfid": 3.0})
    table = published_table(read_table(written(tmp_path, TABLE)), ours)
    assert "has the name of a row" not in table.caption
    assert table.header == ["row", "paper", "ours", "paper", "ours", "paper", "ours"]
    assert list(table.spans) == [("", 1), ("rFID", 2), ("PSNR, dB", 2), ("rFID, faces", 2)]
    assert table.rows[0] == ["another paper's (quoted)", "5.00", "–", "–", "–", "–", "–"]
    assert table.rows[1] == ["VQGAN-LC", "2.62", "2.50", "23.80", "24.00", "4.00", "3.00"]


def test_the_caption_says_where_no_report_has_the_name_of_a_row(tmp_path: Path) -> None:
    ours = OurNumbers()
    ours.add("cleanfid-matched", "photos", ("lc",), {"rfid": 1.0})
    caption = published_table(read_table(written(tmp_path, TABLE)), ours).caption
    assert caption.startswith("No report of protocol adm has the name of a row: lc. Ours:")


def test_an_equal_name_is_preferred_to_one_that_ends_with_it() -> None:
    ours = OurNumbers()
    ours.add("adm", "", ("figure-lc",), {"rfid": 1.0})
    ours.add("adm", "", ("lc",), {"rfid": 2.0})
    assert ours.find("adm", "", "lc", "rfid") == 2.0
    assert ours.find("adm", "", "c", "rfid") is None


def test_a_number_that_one_report_lacks_is_that_of_another_on_the_same_images() -> None:
    ours = OurNumbers()
    ours.add("adm", "kodak", ("lc", "quick"), {"psnr": 21.0, "rfid": None})  # without weights
    ours.add("adm", "faces", ("lc", "faces"), {"psnr": 25.0, "rfid": 9.0})
    ours.add("adm", "kodak", ("lc", "whole"), {"psnr": 22.0, "rfid": 3.0})
    assert ours.find("adm", "kodak", "lc", "rfid") == ours.find("adm", "", "lc", "rfid") == 3.0
    assert ours.find("adm", "", "lc", "psnr") == 21.0
    assert ours.find("adm", "faces", "lc", "rfid") == 9.0
    assert ours.find("adm", "", "lc", "ssim") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 3", "no table of published numbers"),
        (TABLE.replace("2.62, ", ""), "2 numbers for 3 columns: VQGAN-LC"),
        (TABLE.replace("2.62", '"2.62"'), "rfid of VQGAN-LC is '2.62'"),
        ("][", "no table of published numbers"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_table(written(tmp_path, text))


def test_a_column_that_is_no_measure_is_refused(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, TABLE.replace('"psnr"', '"psnrr"')))
    with pytest.raises(ConfigError, match="unknown column 'psnrr'"):
        published_table(table, OurNumbers())


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_table_of_the_papers_reads_and_has_known_columns(path: Path) -> None:
    table = read_table(path)
    assert len(published_table(table, OurNumbers()).rows) == len(table.rows)
