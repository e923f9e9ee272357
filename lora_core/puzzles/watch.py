"""Watching a learner's PyTorch: which tensors are made from the operands, and how large they are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_core.puzzles.compare import WrongAnswer


class Watch(TorchDispatchMode):
    """Follows what is computed from some tensors, and from others beside them.

    Args:
        tensors: to follow.
        others: what is computed from these too is of no interest, as an activation is that a weight was multiplied by.
    Attributes:
        shapes: of every tensor made from `tensors`.
        elements: of the largest memory that holds what is made from `tensors` and not from `others`.
    """

    def __init__(self, tensors: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # by address; held, so that no other memory takes it
        self._memory: dict[int, Any] = {}
        self._followed, self._mixed = {self._note(t) for t in tensors}, {self._note(t) for t in others}
        self._given = set(self._memory)
        self.shapes: set[tuple[int, ...]] = set()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {self._note(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for t in (t for t in tree_iter(out) if isinstance(t, Tensor)):
            place = self._note(t)
            if place in self._given:
                continue
            if read & self._mixed:
                self._mixed.add(place)
            if read & self._followed:
                self._followed.add(place)
            if place in self._followed:
                self.shapes.add(tuple(t.shape))
                if place not in self._mixed:
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._memory[storage.data_ptr()] = storage
        return storage.data_ptr()

    def formed(self, n: int, k: int) -> bool:
        """Say whether something made from the tensors has both a side n and a side k."""
        return any(n in shape and k in shape for shape in self.shapes)


class _Transforms(TorchFunctionMode):
    """Notes whether torch.func was at work, whose derivatives go past inference mode."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch._C._functorch.peek_interpreter_stack() is not None
        return func(*args, **(kwargs or {}))


def by_hand(given: str, solve: Callable[..., Any], *args: Any) -> Any:
    """Return solve(*args); raise WrongAnswer if it took a derivative by autograd, which records nothing here."""
    refusal = WrongAnswer(f"{given}: autograd was asked for a gradient: derive it by hand")
    try:
        with torch.inference_mode(), _Transforms() as transforms:
            result = solve(*args)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise refusal from error
    if transforms.seen:
        raise refusal
    return result
