"""One file a benchmark: what is compared, on which shapes, and the check without which nothing is recorded."""
