"""Fuzzing of our own parsers that is guided by coverage, for as long as one likes. It is no test, and needs atheris:

    pip install atheris
    python tests/faults/guided.py tar -max_total_time=600

The first word is a parser of test_fuzz.py; the others go to libFuzzer. It ends with a traceback at the first input that
is neither a result nor one of our errors in one line; that input becomes a plain case in test_fuzz.py.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vqpipe"]):
    from test_fuzz import PARSERS, furnished

    from vqpipe.errors import VqpipeError

LIMITS = ["-timeout=20", "-rss_limit_mb=6000", "-max_len=20000"]


def main(name: str, *options: str) -> None:
    """Feed the parser `name` until something else than an answer comes out, or the time is up."""
    parser = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = furnished(Path(place))
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
