"""CPU fast paths: each registers itself for its operation when imported, and gives the reference's bits."""
