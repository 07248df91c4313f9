"""`vqpipe bench` end to end, at quick sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.bench import bench
from vqpipe import benchmarks, distributed
from vqpipe.artifacts import open_artifact
from vqpipe.benchmarks import job, search, timing
from vqpipe.benchmarks.timing import Case, Method, Settings, measure, measurements
from vqpipe.errors import ArtifactError, ConfigError

ROW_KEYS = {
    *("name", "version", "exact", "ours", "note", "rounds", "wall_ms", "wall_min_ms", "cpu_ms", "peak_mb", "rate"),
    *("ratio_wall", "ratio_cpu", "same_ids", "extra"),
}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.001)


def test_numbers_page_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(out=tmp_path / "bench", what="kmeans,search", quick=True, rounds=1, as_json=True, device="cpu")
    said = capsys.readouterr()
    metrics = json.loads(said.out)
    assert metrics == json.loads((tmp_path / "bench" / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == ["settings", "machine", "versions", "subjects"]
    assert list(metrics["subjects"]) == ["search", "kmeans"]
    assert metrics["settings"]["quick"] is True
    assert metrics["machine"]["cpu"]
    assert metrics["machine"]["cpus"] >= 1
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
        assert case["title"][1:] in said.err
    assert html.count("<svg") == len(cases)
    assert "published: " in said.err
    artifact = open_artifact(tmp_path / "bench", "report")
    assert artifact.facts == {"measured": "search, kmeans", "sizes": "quick", "device": "cpu"}

    bench(out=tmp_path / "bench", what="search,kmeans", quick=True, rounds=1, device="cpu")
    again = capsys.readouterr()
    assert "already published" in again.err
    assert "to measure again, choose another --out" in again.err
    assert again.out.strip() == str(tmp_path / "bench")


@pytest.fixture
def fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a benchmark of two empty cases, and the list of those that ran."""

    def nothing(progress: object) -> Case:
        methods = [Method(name="vqpipe", call=lambda: None, version="1", ours=True)]
        case, settings = Case(title="nothing", unit="things", settings={}), Settings(device=torch.device("cpu"))
        case.rows = measurements(methods, measure(methods, case, settings), settings, 1)
        ran.append("nothing")
        return case

    ran: list[str] = []
    monkeypatch.setattr(search, "cases", lambda settings: [nothing, nothing])
    options = {"out": tmp_path / "bench", "what": "search", "quick": True, "rounds": 1, "device": "cpu"}
    return {"options": options, "ran": ran, "case": nothing}


def test_another_machine_is_refused_with_the_key_that_differs(
    fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(**fast["options"])
    monkeypatch.setattr(job, "cpu_name", lambda: "Another CPU")
    with pytest.raises(ArtifactError, match=r"made with other settings: machine\.cpu was .* now .Another CPU"):
        bench(**fast["options"])


def test_an_interrupted_benchmark_continues_at_the_next_case(
    fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(progress: object) -> Case:
        raise KeyboardInterrupt

    whole = search.cases
    monkeypatch.setattr(search, "cases", lambda settings: [fast["case"], interrupted])
    with pytest.raises(KeyboardInterrupt):
        bench(**fast["options"])
    assert not fast["options"]["out"].exists()
    monkeypatch.setattr(search, "cases", whole)
    bench(**fast["options"])
    assert fast["ran"] == ["nothing", "nothing"]
    assert "cases/search-0.json: measured by an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "message"), [("serach", "Did you mean search"), ("zzz", "Known: "), (" , ", "Known: ")]
)
def test_an_unknown_subject_is_one_line_with_the_choices(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        bench(out=tmp_path / "bench", what=what, device="cpu")
    assert all(name in str(caught.value) for name in benchmarks.SUBJECTS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bench").exists()


def test_a_gpu_is_required_unless_quick(fast: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device on this machine"):
        bench(out=tmp_path / "full", what="search", gpu=True)
    bench(**fast["options"] | {"gpu": True, "device": "auto"})
    assert open_artifact(fast["options"]["out"], "report").facts["device"] == "cpu"


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="measures one process, not 2"):
        bench(out=tmp_path / "bench", device="cpu")


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (3.0, True)])
def test_a_busy_machine_gives_a_warning(load: float, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert ("busy" in job.busy_warning()) is busy
