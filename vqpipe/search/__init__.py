"""Exact nearest-code search."""

from vqpipe.search.nearest import nearest

__all__ = ["nearest"]
