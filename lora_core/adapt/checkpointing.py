"""Activation checkpointing over a frozen model: gradients must have a way in.

Reentrant checkpointing (torch.utils.checkpoint with use_reentrant=True) runs a block without recording it and records
it again in the backward, but only if one of the block's inputs requires a gradient. Over a frozen embedding none does,
and the adapters inside would never be trained.
"""

from torch import nn

MARK = "lora_core_gradients_let_in"


def let_gradients_in(model: nn.Module) -> None:
    """Make a transformers model that checkpoints activations give its blocks an input that requires a gradient."""
    enable = getattr(model, "enable_input_require_grads", None)
    checkpoints = any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
    # once is enough, whoever did it: each call adds a hook
    already = MARK in model.__dict__ or getattr(model, "_require_grads_hooks", None)
    if callable(enable) and checkpoints and not already:
        enable()
        model.__dict__[MARK] = True


def keep_gradients_out(model: nn.Module) -> None:
    """Undo let_gradients_in."""
    if model.__dict__.pop(MARK, False):
        disable = getattr(model, "disable_input_require_grads", None)
        if callable(disable):
            disable()
