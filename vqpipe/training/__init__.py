"""From a set of images to a trained tokenizer."""
