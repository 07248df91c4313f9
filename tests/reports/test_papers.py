"""Which row of a paper a command reproduces, and when there is none."""

import pytest

from vqpipe import presets
from vqpipe.reports.papers import paper_row, printed

LC = "vqpipe train --preset vqgan-lc-f16-100k --images photos --out lc"


def test_a_preset_gives_the_row_of_its_paper_with_the_protocol_of_the_paper() -> None:
    row = paper_row([LC, "vqpipe eval --images photos --tokenizer lc --out DIR"])
    assert row is not None
    assert row.values == pytest.approx({"rfid": 2.62, "lpips": 0.12, "psnr": 23.8, "ssim": 0.589, "utilization": 0.999})
    assert row.short == "Zhu et al. 2024, VQGAN-LC"
    assert row.row.startswith("Table 2")
    assert row.protocol == "clean-fid against raw, uncropped validation images; PSNR on studio-range luma"
    assert row.changed == []


def test_settings_that_the_run_changed_are_listed() -> None:
    options = " --steps=300 --set objective.lpips_weights=/w --set 'model.quantizer.codebook_size = 7' --from a/b"
    row = paper_row([LC + options])
    assert row is not None
    assert row.changed == ["model.quantizer.codebook_size = 7", "--steps 300", "--from b"]


def test_a_row_quoted_from_another_paper_has_the_protocol_of_that_paper() -> None:
    ours, theirs = (paper_row([f"vqpipe train --preset {name}"]) for name in ("mgvq-f16-g4", "llamagen-f16-16k"))
    assert ours is not None
    assert theirs is not None
    assert ours.protocol.startswith("clean-fid on matched crops")
    assert theirs.protocol == "ADM evaluator, mean PSNR, SSIM at data range 2"


@pytest.mark.parametrize(
    "command",
    [
        "vqpipe train --images photos --out lc",
        "vqpipe train --preset mine.toml --out lc",
        "vqpipe train --preset no-such-preset --out lc",
        "vqpipe train --preset small --out lc",  # has no paper
        "vqpipe train --preset fsq-f16-64k --out lc",  # its paper has no such row
        "vqpipe import-checkpoint released.pt --out lc",
        "vqpipe demo",
    ],
)
def test_there_is_no_row_without_a_preset_a_paper_or_a_number(command: str) -> None:
    assert paper_row([command, "vqpipe eval --preset mgvq-f16-g4 --out DIR"]) is None


def test_only_exact_numbers_of_known_names_are_read() -> None:
    assert printed("about 20 minutes; PSNR 22.9 dB and 95.8 % of the codes in use") == {}
    assert printed("unknown, rFID about 2, usage 97 %, SSIM 0.675") == {"utilization": 0.97, "ssim": 0.675}


def test_every_preset_with_a_printed_number_states_its_protocol() -> None:
    rows = {name: paper_row([f"vqpipe train --preset {name}"]) for name in presets.names()}
    stated = {name: row for name, row in rows.items() if row is not None}
    assert len(stated) >= 15
    for name, row in stated.items():
        assert row.protocol != "an unstated protocol", name
        assert all(0 < value <= 1 for key, value in row.values.items() if key in ("ssim", "utilization")), name
