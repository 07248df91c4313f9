"""Exact nearest-code search."""

from vqpipe.search.copies import first_copies, row_hashes
from vqpipe.search.nearest import nearest

__all__ = ["first_copies", "nearest", "row_hashes"]
