"""Rate drawings: every name on the page, none over another or over a mark."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from vqpipe.reports import rates

KINDS = ["vq", "ema", "lc", "cvq", "multi_group", "lfq", "fsq", "simvq", "ibq", "residual", "multi_scale", "vqgan-lc"]
CROWDED = {name: (0.15 + 0.001 * (number % 3), 20 + 0.03 * number) for number, name in enumerate(KINDS)}
SPREAD = {name: (0.05 * 1.3**number, 18 + number % 5) for number, name in enumerate(KINDS)}


@pytest.mark.parametrize("points", [CROWDED, SPREAD, dict(list(CROWDED.items())[:1])])
def test_labels_meet_neither_each_other_nor_a_mark(
    points: dict[str, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {}
    write = rates.write

    def noting(axes: rates.Axes, name: str, box: rates.Box) -> None:
        written[name] = (axes, box)
        write(axes, name, box)

    monkeypatch.setattr(rates, "write", noting)
    plot = rates.rate_distortion({**points, "sd-vae": (None, 23.0), "sdxl-vae": (None, 23.1)})
    assert written.keys() == {*points, "sd-vae", "sdxl-vae"}
    boxes = [box for _, box in written.values()]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].meets(pair[1])]
    axes = written["vq"][0]
    marks = [rates.on_figure(axes, *point) for point in points.values()]
    assert not [1 for (x, y), box in itertools.product(marks, boxes) if box.meets(rates.Box(x, y, x, y))]
    drawing = ET.fromstring(plot.svg)
    texts = ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]
    assert set(written) <= set(texts)
    assert "sd-vae 23.00 dB with continuous latents" in plot.alt


def test_a_k_curve_names_its_ends_and_is_absent_where_nothing_was_measured() -> None:
    rows = [{"groups": k, "bits_per_pixel": 0.05 * k, "psnr": 12.0 + 4 * k, "ssim": 0.2 * k} for k in (1, 2, 3)]
    psnr, ssim = rates.k_curves({"mgvq": rows})
    assert psnr.alt == "k = 1: 16, k = 2: 20, k = 3: 24"
    assert "0.6" in ssim.alt
    both = rates.k_curves({"mgvq": rows, "rq": rows[:2]})[0]
    assert "rq: k = 1: 16, k = 2: 20" in both.alt
    assert len(set(re.findall(r'id="([^"]+)"', psnr.svg)) & set(re.findall(r'id="([^"]+)"', ssim.svg))) == 0
    assert rates.k_curves({"same": [{"groups": 1, "bits_per_pixel": 0.1}]}) == []
