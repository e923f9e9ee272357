"""Reading a checkpoint without a model: what it holds, and what is wrong with it."""
