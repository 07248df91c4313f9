"""What this machine does per second, beside the peers it can import; one file per subject."""
