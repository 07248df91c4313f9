"""How good reconstructions are and how the codes are used, told with the convention behind each number."""

from vqpipe.metrics.config import EvalConfig as EvalConfig
