"""Pages of generated images."""

from typing import Any

from vqpipe.reports import page
from vqpipe.reports.generated import Generated, comparison, generated_page, groups_table, guidance_curves


def samples(name: str, fid: float, scale: float | None = None, generator: str = "dit", **more: Any) -> Generated:
    metrics: dict[str, Any] = {"protocol": "adm", "image_size": 8, "num_references": 9, "num_images": 5, "fid": fid}
    metrics |= {"not_computed": {}, "utilization": 0.25}
    if scale is not None:
        metrics["generator"] = {"name": generator, "content": more.pop("content", f"{generator}-content")}
        metrics["sampling"] = {"cfg_scale": scale, "steps": 250}
    return Generated(name, metrics | more, b"", {"kind": "report", "name": "r", "content": "", "inputs": {}})


def test_scales_of_guidance_have_a_column_and_a_curve() -> None:
    several = [
        samples("c", 9.0, 4.0),
        samples("a", 8.0, 1.0),
        samples("b", 5.0, 2.0),
        samples("other", 7.0, 2.0, "sit"),
    ]
    table = comparison(several)
    assert table.header == ["samples", "number", "guidance", "FID", "codes in use"]
    assert [row[2] for row in table.rows] == ["4", "1", "2", "2"]
    (curve,) = guidance_curves(several)
    assert curve.title == "FID"
    assert "dit ends at 9" in curve.alt
    assert "sit" not in curve.alt  # one scale is no curve
    assert "Scale of guidance" in page.render(generated_page(several, "sweep"))


def test_other_settings_and_other_generators_of_the_same_name_have_curves_of_their_own() -> None:
    first_channels = {"steps": 250, "cfg_channels": 3}
    several = [
        *(samples(f"all-{scale}", scale + 1, scale) for scale in (1.0, 2.0)),
        *(samples(f"three-{s}", s, s, sampling={"cfg_scale": s, **first_channels}) for s in (1.0, 3.0)),
        *(samples(f"few-{scale}", 30 + scale, scale, num_images=2) for scale in (1.0, 2.0)),
        *(samples(f"again-{scale}", 40 + scale, scale, content="other") for scale in (1.0, 2.0)),
    ]
    (curve,) = guidance_curves(several)
    assert "dit, generator dit-content, num_images 5 ends at 3" in curve.alt
    assert "dit, generator dit-content, num_images 5, cfg_channels 3 ends at 3" in curve.alt
    assert "dit, generator dit-content, num_images 2 ends at 32" in curve.alt
    assert "dit, generator other, num_images 5 ends at 42" in curve.alt
    (curve,) = guidance_curves(several[:4])
    assert "dit, cfg_channels 3 ends at 3" in curve.alt


def test_samples_of_other_classes_have_a_curve_of_their_own() -> None:
    def swept(classes: str, fid: float) -> list[Generated]:
        return [samples(f"{classes}-{scale}", fid + scale, scale, classes=classes) for scale in (1.0, 2.0)]

    (curve,) = guidance_curves([*swept("0-99,200-299", 1.0), *swept("0-99,200-299,500", 5.0)])
    assert "dit, classes 0-99,200-299 ends at 3" in curve.alt
    assert "dit, classes 0-99,200-299,500 ends at 7" in curve.alt
    (curve,) = guidance_curves(swept("0-99", 1.0))
    assert "dit ends at 3" in curve.alt


def test_inception_score_has_a_curve_of_its_own() -> None:
    several = [samples(f"{scale}", 5.0, scale, inception_score={"mean": 10 * scale}) for scale in (1.0, 2.0)]
    assert [curve.title for curve in guidance_curves(several)] == ["FID", "Inception Score"]
    assert "dit ends at 20" in guidance_curves(several)[1].alt


def test_the_use_of_codes_is_stated_with_the_number_of_ids_and_by_group() -> None:
    usage = {"utilization": 0.375, "utilization_per_group": [0.5, 0.25], "perplexity_per_group": [4.0, 2.0]}
    one = samples("one", 8.0, **usage, num_ids=40, codebook_size=8, num_groups=2)
    html = page.render(generated_page([one], "one"))
    assert "of 2 x 8 codes, over 40 ids" in html
    assert "Codes in use by group" in html
    numbers = comparison([one])
    assert numbers.header[3:] == ["codes in use", "perplexity"]
    assert numbers.rows[0][3:] == [page.Cell("37.5 %"), page.Cell("3.0")]
    table = groups_table(one.metrics)
    assert table is not None
    assert table.rows == [["1", "50.0 %", "4.0"], ["2", "25.0 %", "2.0"]]  # as eval numbers them


def test_every_number_has_its_column_and_the_better_one_is_highlighted() -> None:
    def numbers(better: float) -> dict[str, Any]:
        means = {"inception_score": {"mean": 100 + better}, "kid": {"mean": 0.03 - better / 100}}
        prc = {"precision": 0.5 + better / 10, "recall": 0.2 + better / 10}
        return {"sfid": 9 - better, "prc": prc, "utilization": better / 4, "frechet": {"net": 6 - better}, **means}

    table = comparison([samples("a", 8.0, **numbers(1)), samples("b", 7.0, **numbers(2))])
    labels = ["FID", "sFID", "Inception Score", "KID", "precision", "recall", "codes in use", "Frechet, net"]
    assert table.header == ["samples", "number", *labels]
    shown = ["7.00", "7.00", "102.0", "0.01000", "0.700", "0.400", "50.0 %", "4.00"]
    worse, better = (row[2:] for row in table.rows)
    assert better == [page.Cell(text, text != "50.0 %") for text in shown]  # more codes in use are not better as such
    assert not any(isinstance(cell, page.Cell) and cell.best for cell in worse)


def test_without_several_scales_there_is_neither() -> None:
    several = [samples("a", 8.0, 1.5), samples("photos", 7.0)]
    assert comparison(several).header == ["samples", "number", "FID", "codes in use"]
    assert guidance_curves(several) == []
