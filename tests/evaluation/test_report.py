"""What the published report of an evaluation contains beside its numbers."""

import pytest

from vqpipe.evaluation.report import without_out


@pytest.mark.parametrize("out", [" --out artifacts/demo", " --out=DIR", " --out 'a folder'", ""])
def test_commands_that_differ_in_out_alone_are_equal_without_it(out: str) -> None:
    assert without_out(f"vqpipe demo{out} --size tiny") == "vqpipe demo --size tiny"
