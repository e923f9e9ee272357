"""The dtypes that weights and inputs may have."""

import torch

# float8 is a way to store numbers, which no operation here computes in
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
