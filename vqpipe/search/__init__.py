"""Exact nearest-code search."""

from vqpipe.search.copies import first_copies, row_hashes
from vqpipe.search.nearest import engine_name, nearest

__all__ = ["engine_name", "first_copies", "nearest", "row_hashes"]
