"""CPU fast paths: each registers itself for its operation when imported.

Codes and dequantised weights are the reference's to the bit; sums of products are, up to rounding.
"""
