"""Jobs that measure a tokenizer or generated images in one pass over images."""
