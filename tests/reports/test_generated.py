"""Pages of generated images."""

from typing import Any

from vqpipe.reports import page
from vqpipe.reports.generated import Generated, comparison_rows, generated_page, guidance_curves


def samples(name: str, fid: float, scale: float | None = None, generator: str = "dit") -> Generated:
    metrics: dict[str, Any] = {"protocol": "adm", "image_size": 8, "num_references": 9, "num_images": 5, "fid": fid}
    metrics |= {"not_computed": {}, "utilization": 0.25}
    if scale is not None:
        metrics["sampling"] = {"cfg_scale": scale}
    made_by = {"generator": {"kind": "generator", "name": generator, "content": "", "inputs": {}}}
    images = {"kind": "images", "name": name, "content": name, "inputs": made_by}
    return Generated(name, metrics, b"", {"kind": "report", "name": "r", "content": "", "inputs": {"images": images}})


def test_scales_of_guidance_have_a_column_and_a_curve() -> None:
    several = [
        samples("c", 9.0, 4.0),
        samples("a", 8.0, 1.0),
        samples("b", 5.0, 2.0),
        samples("other", 7.0, 2.0, "sit"),
    ]
    header, rows = comparison_rows(several)
    assert header == ["samples", "number", "guidance", "FID", "codes in use"]
    assert [row[2][0] for row in rows] == ["4", "1", "2", "2"]
    (curve,) = guidance_curves(several)
    assert curve.title == "FID"
    assert "dit ends at 9" in curve.alt
    assert "sit" not in curve.alt  # one scale is no curve
    assert "Scale of guidance" in page.render(generated_page(several, "sweep"))


def test_without_several_scales_there_is_neither() -> None:
    several = [samples("a", 8.0, 1.5), samples("photos", 7.0)]
    assert comparison_rows(several)[0] == ["samples", "number", "FID", "codes in use"]
    assert guidance_curves(several) == []
