"""Evaluation: measures a tokenizer, or generated images, in one pass over images, and reports the numbers."""
