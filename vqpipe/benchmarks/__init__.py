"""What this machine does per second, beside other libraries: search, k-means, training step, encoding.

`metrics.json` of a benchmark, which `vqpipe bench --json` prints:

    settings   quick, rounds, seed, device, memory_gb, patience_s
    machine    cpu, cpus, threads, memory_gb, instructions; gpu, gpu_memory_gb
    versions   package -> version, and git
    subjects   subject -> list of cases: the fields of `timing.Case`, and of `timing.Row` in its `rows`
"""

from vqpipe.benchmarks.job import SUBJECTS, free_memory, parse_subjects, preset_of, request, run
from vqpipe.benchmarks.timing import Settings

__all__ = ["SUBJECTS", "Settings", "free_memory", "parse_subjects", "preset_of", "request", "run"]
