"""The numbers of the tables on codes."""

import torch

from vqpipe.metrics.usage import spread_of, usage_of
from vqpipe.reports.codebook_use import budget_table, group_table, maps_of
from vqpipe.reports.evaluation import EvaluationResult, number_rows

COUNTS = torch.tensor([[3, 1, 0, 0], [5, 2, 2, 0]])


def test_utilization_is_beside_that_of_uniform_codes_and_of_the_least_and_most_used_group() -> None:
    row = {"tokens": 65_536, "utilization": 0.5, "utilization_per_group": [0.75, 0.25], "uniform_utilization": 0.99999}
    table = budget_table([row])
    assert table.header == ["tokens of a group", "codes in use", "uniform codes", "least and most used group"]
    assert table.rows == [["65,536", "50.0 %", "99.9 %", "25.0 % to 75.0 %"]]  # never rounded up to 100 %


def test_each_group_has_a_row_of_its_counts() -> None:
    table = group_table({**usage_of(COUNTS), **spread_of(COUNTS)})
    assert table.header[1:4] == ["codes in use", "never chosen", "perplexity"]
    assert table.header[4:] == ["Gini", "least chosen, times", "most chosen, times"]
    assert table.rows == [
        ["group 1", "50.0 %", "2", "1.8", "0.625", "0", "3"],
        ["group 2", "75.0 %", "1", "2.7", "0.417", "0", "5"],
    ]
    full = group_table({**usage_of(COUNTS[:, :2]), **spread_of(COUNTS[:, :2])})
    assert [row[5:] for row in full.rows] == [["1", "3"], ["2", "5"]]


def test_the_map_counts_the_codes_in_use_of_all_groups() -> None:
    (shown,) = maps_of([EvaluationResult("lc", {}, COUNTS)])
    assert "5 of 8 codes in use (62.5 %)" in shown.alt


def test_a_share_below_all_is_100_percent_nowhere() -> None:
    counts = torch.ones(1, 10_000, dtype=torch.int64)
    counts[0, :2] = 0
    metrics = {"protocol": "adm", "rfid": {}, "num_images": 4, "utilization": 0.9998}
    metrics |= {**usage_of(counts), **spread_of(counts)}
    (shown,) = maps_of([EvaluationResult("lc", {}, counts)])
    assert ("codes in use", "99.9 %") in [row[:2] for row in number_rows(metrics)]
    assert group_table(metrics).rows[0][1] == "99.9 %"
    assert "9,998 of 10,000 codes in use (99.9 %)" in shown.alt
