"""PyTorch operations lora_core::*: schema, checks, reference body, fake, gradient."""
