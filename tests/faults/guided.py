"""Coverage-guided fuzzing of the parsers. Not a test; needs atheris:

    pip install atheris
    python tests/faults/guided.py tar -max_total_time=600

The first word is a parser of test_fuzz.py; the others are options of libFuzzer. It stops with a traceback at the first
input that gives neither a result nor a VqpipeError in one line; add that input to test_fuzz.py as a plain case.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vqpipe"]):
    from test_fuzz import PARSERS, with_artifact

    from vqpipe.errors import VqpipeError

LIMITS = ["-timeout=20", "-rss_limit_mb=6000", "-max_len=20000"]


def main(name: str, *options: str) -> None:
    """Fuzz the parser `name` until it fails or its time has passed."""
    parser = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = with_artifact(Path(place))
        corpus = Path(place) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(parser.seeds(folder)):
            (corpus / f"seed-{number}").write_bytes(seed)

        def feed(data: bytes) -> None:
            try:
                parser.parse(folder, data)
            except VqpipeError as error:
                if "\n" in str(error):
                    raise AssertionError("more than one line") from error

        atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
