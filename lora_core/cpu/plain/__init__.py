"""The loops of lora_core/cpu/compiled in NumPy and PyTorch: the same functions, results and arguments."""
