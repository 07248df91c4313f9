"""What is known of each data set: where users get it, under which licence, and what a complete copy holds."""
