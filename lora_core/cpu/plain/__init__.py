"""The loops of lora_core/cpu/compiled in NumPy and PyTorch: the same results of the same arguments."""
