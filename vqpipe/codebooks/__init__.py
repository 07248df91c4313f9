"""Frozen codebooks: patch features of pretrained encoders, and their k-means centers."""
