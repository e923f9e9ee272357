"""The mathematics in plain PyTorch: the truth that every fast path is tested against."""
