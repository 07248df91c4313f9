"""`vqpipe bench` end to end, on small sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages import bench as stage
from stages.bench import bench
from vqpipe.artifacts import open_artifact
from vqpipe.benchmarks import loading, measure
from vqpipe.errors import ArtifactError, ConfigError

ROW_KEYS = {
    *("name", "version", "exact", "ours", "note", "rounds", "wall_ms", "wall_min_ms", "cpu_ms", "peak_mb", "rate"),
    *("ratio_wall", "ratio_cpu", "same_ids", "extra"),
}


def test_numbers_page_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(out=tmp_path / "bench", what="data,search", quick=True, rounds=1, as_json=True, device="cpu")
    said = capsys.readouterr()
    metrics = json.loads(said.out)
    assert metrics == json.loads((tmp_path / "bench" / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == ["settings", "machine", "versions", "subjects"]
    assert list(metrics["subjects"]) == ["search", "data"]
    assert metrics["settings"]["quick"] is True
    assert metrics["machine"]["cpu"]
    assert metrics["versions"]["torch"]
    cases = [case for each in metrics["subjects"].values() for case in each]
    html = (tmp_path / "bench" / "report.html").read_text(encoding="utf-8")
    for case in cases:
        assert case["load"] >= 0
        for row in case["rows"]:
            assert row.keys() == ROW_KEYS
            assert row["rounds"] == 1
            assert f'<th scope="row">{row["name"]}</th>' in html
        for name, reason in case["not_run"].items():
            assert f"not measured: {name}: {reason}" in said.err
            assert reason in html
        assert case["title"] in said.err
    assert html.count("<svg") == len(cases)
    assert "published: " in said.err
    artifact = open_artifact(tmp_path / "bench", "report")
    assert artifact.facts == {"measured": "search, data", "sizes": "quick", "device": "cpu"}
    assert "search_over_naive" not in artifact.facts  # small sizes are no numbers to quote

    bench(out=tmp_path / "bench", what="search,data", quick=True, rounds=1, device="cpu")
    again = capsys.readouterr()
    assert "already published" in again.err
    assert "to measure again, choose another --out" in again.err
    assert again.out.strip() == str(tmp_path / "bench")


@pytest.fixture
def quick_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a bench that takes no time: one case of nothing."""

    def nothing(stopwatch: measure.Stopwatch) -> measure.Case:
        methods = [measure.Method(name="vqpipe", call=lambda: None, ours=True)]
        case = measure.Case(title="nothing", unit="things", settings={})
        case.rows = stopwatch.rows(methods, stopwatch.measure(methods, case), 1)
        ran.append("nothing")
        return case

    ran: list[str] = []
    monkeypatch.setattr(loading, "plans", lambda settings: [measure.Plan("nothing", 1, nothing)] * 2)
    options = {"out": tmp_path / "bench", "what": "data", "quick": True, "rounds": 1, "device": "cpu"}
    return {"options": options, "ran": ran}


def test_another_machine_or_version_is_not_answered_with_these_numbers(
    quick_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(**quick_data["options"])
    monkeypatch.setattr(measure, "cpu_name", lambda: "Another CPU")
    with pytest.raises(ArtifactError, match=r"made otherwise: config\.machine\.cpu was .* now .Another CPU"):
        bench(**quick_data["options"])


def test_a_run_that_was_cut_goes_on_at_the_first_case_that_is_missing(
    quick_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = loading.plans(measure.Settings(device=measure.torch.device("cpu")))[0]

    def cut(stopwatch: measure.Stopwatch) -> measure.Case:
        raise KeyboardInterrupt

    whole = loading.plans
    monkeypatch.setattr(loading, "plans", lambda settings: [nothing, measure.Plan("cut", 1, cut)])
    with pytest.raises(KeyboardInterrupt):
        bench(**quick_data["options"])
    assert not quick_data["options"]["out"].exists()
    monkeypatch.setattr(loading, "plans", whole)
    bench(**quick_data["options"])
    assert quick_data["ran"] == ["nothing", "nothing"]
    assert "cases/data-0.json: measured by the run before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "message"), [("serach", "Did you mean search"), ("zzz", "Known: "), (" , ", "Known: ")]
)
def test_an_unknown_subject_is_one_line_with_the_choices(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        bench(out=tmp_path / "bench", what=what, device="cpu")
    assert all(name in str(caught.value) for name in stage.WHAT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bench").exists()


def test_under_torchrun_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vqpipe import distributed

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="measures one process, not 2"):
        bench(out=tmp_path / "bench", device="cpu")


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for load, busy in ((0.1, False), (3.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        stage.warn_if_busy()
        assert ("busy" in capsys.readouterr().err) is busy
