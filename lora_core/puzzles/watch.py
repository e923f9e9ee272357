"""Watching a learner's PyTorch: which tensors are made from which operands, and how large they are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_core.puzzles.compare import WrongAnswer

# what writes a constant over a memory
FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


@dataclass(frozen=True)
class Grown:
    """A memory larger than the tensors that it was made from.

    Args:
        sources: their places among the followed tensors.
        elements: of the memory.
        held: elements of these tensors together.
    """

    sources: tuple[int, ...]
    elements: int
    held: int


class _Einsums(TorchFunctionMode):
    """Notes the equation of the torch.einsum at work, if it has three operands or more."""

    equation = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.einsum or not args or str(args[0]).count(",") < 2:
            return func(*args, **(kwargs or {}))
        self.equation = str(args[0])
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.equation = ""


class Watch(TorchDispatchMode):
    """Follows what is computed from some tensors, and from others beside them.

    Args:
        tensors: to follow.
        others: what is computed from these too is of no interest, as an activation is that a weight was multiplied by.
    Attributes:
        shapes: of every tensor made from `tensors`, with the equation of the torch.einsum that made it, or nothing.
        joint: elements of all that was made from every one of `tensors` and from none of `others`, piece by piece.
    """

    def __init__(self, tensors: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # by address; held, so that no other memory takes it
        self._memory: dict[int, Any] = {}
        followed = list(tensors)
        self._held = [t.numel() for t in followed]
        self._sources = {self._note(t): {place} for place, t in enumerate(followed)}
        self._mixed = {self._note(t) for t in others}
        self._given = set(self._memory)
        # elements of what is made from tensors and from no others
        self._elements: dict[int, int] = {}
        self._grown: list[Grown] = []
        self._einsums = _Einsums()
        self.shapes: dict[tuple[int, ...], str] = {}
        self.joint = 0

    def __enter__(self) -> "Watch":
        self._einsums.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._einsums.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {self._note(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for t in (t for t in tree_iter(out) if isinstance(t, Tensor)):
            place = self._note(t)
            # an empty tensor has no memory
            if not place or place in self._given:
                continue
            if func.overloadpacket in FILLS:
                self._close(place)
                continue
            in_place = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
            self._follow(t, place, read, written=in_place or place not in read)
        return out

    def _follow(self, tensor: Tensor, place: int, read: set[int], written: bool) -> None:
        """Note what a tensor was made from; a view is not written."""
        if read & self._mixed:
            self._mixed.add(place)
        sources = set().union(*(self._sources.get(other, ()) for other in read))
        if not sources:
            return
        sources = self._sources.setdefault(place, set()) | sources
        self._sources[place] = sources
        self.shapes.setdefault(tuple(tensor.shape), self._einsums.equation)
        if place in self._mixed:
            return
        self._elements[place] = tensor.untyped_storage().nbytes() // tensor.element_size()
        if written and len(sources) == len(self._held):
            self.joint += tensor.numel()

    def _close(self, place: int) -> None:
        """Judge a memory as it is, whose use ends here or which is filled up with a constant, and forget it."""
        sources, elements = self._sources.pop(place, set()), self._elements.pop(place, 0)
        held = sum(self._held[source] for source in sources)
        if elements > held:
            self._grown.append(Grown(tuple(sorted(sources)), elements, held))

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._memory[storage.data_ptr()] = storage
        return storage.data_ptr()

    def formed(self, n: int, k: int) -> bool:
        """Say whether something made from the tensors has both a side n and a side k."""
        return any(n in shape and k in shape for shape in self.shapes)

    def einsum(self, n: int, k: int) -> str:
        """Return the equation of the torch.einsum of three operands that formed this, or nothing."""
        return next((equation for shape, equation in self.shapes.items() if n in shape and k in shape), "")

    def grown(self) -> Grown | None:
        """Return the first memory made from the tensors, and from no others, that is larger than they are."""
        for place in list(self._elements):
            self._close(place)
        return self._grown[0] if self._grown else None


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
