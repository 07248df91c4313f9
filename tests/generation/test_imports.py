"""What every command that names a generator waits for."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_room_defines_every_kind_and_loads_no_large_library() -> None:
    code = (
        "import sys; from vqpipe.generation import generator_classes, published; "
        "print(sorted(each.config_class.kind for each in generator_classes() if hasattr(each, 'config_class')), "
        "sorted({'diffusers', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "['dit', 'gpt', 'ldm', 'llamagen', 'sit'] []"
