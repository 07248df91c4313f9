"""The base class of metrics."""

from abc import ABC, abstractmethod
from typing import Any

from vqpipe.metrics.resumable import Resumable


class Metric(Resumable, ABC):
    """A resumable state that ends in a result. Modelled on torchmetrics.Metric."""

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result over all ranks. Every rank calls it."""
