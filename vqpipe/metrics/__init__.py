"""Metrics of reconstructions and of codebook use."""

from vqpipe.metrics.config import EvalConfig as EvalConfig
