"""The training loop, tasks, callbacks and checkpoints."""
