"""What this machine does per second, beside other libraries and the estimates of `vqpipe plan`: search, k-means,
quantizers, training steps, encoding, generation, loading.

`metrics.json` of a benchmark, which `vqpipe bench --json` prints:

    settings   quick, rounds, seed, device, memory_gb, patience_s
    machine    cpu, cpus, threads, memory_gb, instructions; gpu, gpu_memory_gb
    versions   package -> version, and git
    subjects   subject -> list of cases: the fields of `timing.Case`, and of `timing.Measurement` in its `rows`
"""

from vqpipe.benchmarks.job import free_memory, parse_subjects, presets_of, request, run
from vqpipe.benchmarks.timing import Settings
from vqpipe.reports.benchmark import SUBJECTS

__all__ = ["SUBJECTS", "Settings", "free_memory", "parse_subjects", "presets_of", "request", "run"]
