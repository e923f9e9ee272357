"""Model surgery: one verb a file."""
