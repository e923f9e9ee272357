"""What every adapted layer shares: a frozen base layer and, by name, the low-rank pairs that change it.

    y = base(x) + sum over active adapters i of  s_i B_i A_i drop(x)

A subclass says which shapes A and B have, what their product adds to the base weight, and how to run them.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lora_core.errors import AdapterError, DeviceError
from lora_core.layers.as_written import is_sharded, stands_for_others
from lora_core.layers.matrices import Matrices
from lora_core.layers.merged import Merged, refuse_backward
from lora_core.layers.off import Off

# adapters over a half-precision base are kept in fp32, as PEFT does: their small updates vanish in 8 bits of mantissa
HALF_PRECISION = (torch.float16, torch.bfloat16)

T = TypeVar("T")


def beside(compute: torch.dtype, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as operations take them beside x of this dtype: in that dtype as they are, or in float32."""
    as_they_are = lora_a.dtype == lora_b.dtype and lora_a.dtype in (compute, torch.float32)
    return (lora_a, lora_b) if as_they_are else (lora_a.float(), lora_b.float())


@dataclass
class Adapter:
    """What one adapter is at one layer, apart from its two matrices.

    Args:
        rank: R, the inner dimension of B A.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: probability of zeroing an element of x before A, in [0, 1).
        config: the configuration it was made from; kept to be saved.
        trainable: whether activating it makes its matrices require gradients.
    """

    rank: int
    scaling: float
    dropout: float
    config: Any
    trainable: bool


class Start(nn.Module):
    """A and B at the start, where the initialisation changed the base weight: W <- W - s B A.

    They are part of the state dict, as the weight that they were taken out of is.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)


def reads_from_base(*names: str) -> Callable[[type[T]], type[T]]:
    """Decorate an adapted layer: these attributes are the base layer's, where code around it looks for them."""

    def add(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, property(operator.attrgetter(f"base_layer.{name}")))
        return cls

    return add


def part(name: str) -> Any:
    """Return a property that reads a submodule where it is kept: nn.Module's search takes as long as a small layer."""

    def find(layer: nn.Module) -> Any:
        try:
            return layer._modules[name]
        except KeyError:
            raise AttributeError(name) from None

    return property(find)


class AdapterLayer(nn.Module):
    """Base of the adapted layers; use a subclass.

    Args:
        base_layer: the layer to adapt; its parameters are shared, not copied.
    """

    # how PEFT names the two matrices in a checkpoint
    PEFT_A: ClassVar[str] = "lora_A.weight"
    PEFT_B: ClassVar[str] = "lora_B.weight"
    # read by transformers' save_pretrained: where this is another module's parameter too, one name of it is enough
    _tied_weights_keys: ClassVar[dict[str, None]] = {"base_layer.weight": None}

    base_layer, lora_a, lora_b, lora_start = map(part, ("base_layer", "lora_a", "lora_b", "lora_start"))

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        mode = base_layer.training
        self.lora_a, self.lora_b = Matrices().train(mode), Matrices().train(mode)
        self.lora_start = nn.ModuleDict().train(mode)
        self.adapters: dict[str, Adapter] = {}
        # what activate was given last, and of that what this layer has
        self.chosen: tuple[str, ...] = ()
        self.active: tuple[str, ...] = ()
        self.off = Off()
        self.merged: Merged | None = None
        self.training = mode

    # what a subclass defines

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at this rank."""
        raise NotImplementedError

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Return B A in the shape of the base weight."""
        raise NotImplementedError

    def response(self, x: Tensor, change: Tensor) -> Tensor:
        """Return by how much the base layer's output at x changes when change, of its shape, is added to its weight."""
        raise NotImplementedError

    def sample_input(self) -> Tensor:
        """Return a small random x that the base layer takes."""
        raise NotImplementedError

    def is_as_written(self) -> bool:
        """Say whether calling the base layer means its class's own forward: no subclass, hook or patch in between."""
        raise NotImplementedError

    def is_altered(self) -> bool:
        """Say whether its base layer has hooks or a forward of its own, other than those of fully_shard."""
        return not self.is_as_written() and not is_sharded(self.weight)

    def why_unmergeable(self) -> str:
        """Return why the base weight cannot hold an adapter, or "" if it can."""
        weight = self.base_layer._parameters.get("weight")
        if stands_for_others(weight) and not is_sharded(weight):
            return f"its weight is a {type(weight).__name__}, which holds its values in a form of its own"
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed from other tensors (a parametrisation, weight norm, pruning)"
        return "it is on the meta device and has no values" if self.weight.is_meta else ""

    @property
    def replaced(self) -> nn.Module:
        """The module that this one stands in for."""
        base: nn.Module = self.base_layer
        return base

    # the base weight, as modules around this one expect to find it

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def read_weight(self) -> Tensor:
        """Return the base weight, dense, as a detached tensor that may share memory with it."""
        weight: Tensor = self.base_layer.weight.detach()
        return weight

    @torch.no_grad()
    def write_weight(self, value: Tensor) -> None:
        """Overwrite the base weight with value, rounded to the weight's dtype."""
        self.base_layer.weight.copy_(value)

    def backup_weight(self) -> dict[str, Tensor]:
        """Return a CPU copy of all that write_weight changes."""
        return {"weight": self.base_layer.weight.detach().to("cpu", copy=True)}

    @torch.no_grad()
    def restore_weight(self, backup: dict[str, Tensor]) -> None:
        """Put back, bit for bit, what backup_weight returned."""
        self.base_layer.weight.copy_(backup["weight"])

    @contextlib.contextmanager
    def unchanged_on_failure(self) -> Iterator[None]:
        """Put the base weight back, bit for bit, where what is done here does not come to its end."""
        backup = self.backup_weight()
        try:
            yield
        except BaseException:
            self.restore_weight(backup)
            raise

    # adapters

    def add(self, name: str, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Create the matrices of an adapter, uninitialised, on the device where the base layer computes.

        Args:
            name: the adapter's name.
            adapter: its rank, scaling, dropout and configuration.
            dtype: of A and B; by default the base weight's, and float32 where that is half precision.
        """
        if name in self.adapters:
            raise AdapterError(f"adapter {name!r} exists already here: choose another name, or delete it first")
        weight = self.weight
        if dtype is None:
            dtype = torch.float32 if weight.dtype in HALF_PRECISION else weight.dtype
        shape_a, shape_b = self.pair_shapes(adapter.rank)
        # accelerate keeps an offloaded weight on the meta device, and its hook knows where it goes to compute
        device = getattr(getattr(self.base_layer, "_hf_hook", None), "execution_device", None)
        device = weight.device if device is None or not weight.is_meta else device
        self.lora_a[name] = nn.Parameter(torch.empty(shape_a, dtype=dtype, device=device))
        self.lora_b[name] = nn.Parameter(torch.empty(shape_b, dtype=dtype, device=device))
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter, or what there is of it, undoing what its initialisation did to the base weight."""
        if name in self.lora_start:
            with self.unchanged_on_failure():
                self.shift_weight(*self.start_of(name), self.adapters[name].scaling)
                del self.lora_start[name]
        # in an order in which, stopped half way, the layer runs, and is asked for the rest again
        self.active = tuple(n for n in self.active if n != name)
        for matrices in (self.lora_a, self.lora_b):
            if name in matrices:
                matrices.settle(name)
                del matrices[name]
        self.adapters.pop(name, None)

    def matrices(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of an adapter, on the device of x.

        Raises:
            DeviceError: if they are on another: a product of x and a matrix on the meta device would be noise.
        """
        lora_a, lora_b = self.lora_a.bring(name), self.lora_b.bring(name)
        if lora_a.device != x.device or lora_b.device != x.device:
            raise DeviceError(
                f"adapter {name!r}: A is on {lora_a.device}, B on {lora_b.device}, x on {x.device}; want one device: "
                "move the model with .to(device), or load the adapter before the model is offloaded"
            )
        return lora_a, lora_b

    def activate(self, names: tuple[str, ...]) -> None:
        """Run these adapters, of those this layer has, and make just the trainable ones require gradients."""
        self.chosen = names
        self.active = tuple(n for n in names if n in self.adapters)
        for name, adapter in self.adapters.items():
            wanted = adapter.trainable and name in self.active and self.merged is None
            for parameter in (*self.lora_a.held(name), *self.lora_b.held(name)):
                parameter.requires_grad_(wanted)

    def running(self) -> tuple[str, ...]:
        """Return the adapters that the next forward adds to the base layer's output."""
        return self.active if not self.off.blocks and self.merged is None else ()

    def handed_out(self, y: Tensor) -> Tensor:
        """Return the layer's output; while merged, in training mode, as one that no gradient passes."""
        if self.merged is None or not self.training:
            return y
        trained = any(self.adapters[name].trainable for name in self.merged.names if name in self.adapters)
        return refuse_backward(y, self.merged.names) if trained else y

    def start_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B at an adapter's start, which was taken out of the base weight."""
        start: Any = self.lora_start[name]
        return start.lora_a, start.lora_b

    def owed(self) -> list[tuple[Tensor, Tensor, float]]:
        """Return A, B and s of what dormant adapters' initialisation took out of the base weight, to be added back."""
        present = self.merged.names if self.merged else self.running()
        return [(*self.start_of(n), self.adapters[n].scaling) for n in self.lora_start if n not in present]

    def original_weight(self) -> Tensor:
        """Return the base weight as it was before any adapter's initialisation: itself, or in float32 or wider."""
        weight = self.read_weight()
        for name in self.lora_start:
            lora_a, lora_b = self.start_of(name)
            wide = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
            product = self.product(lora_a.to(wide), lora_b.to(wide))
            weight = weight.to(wide) + self.adapters[name].scaling * product.to(weight.device)
        return weight

    def delta(self, name: str) -> Tensor:
        """Return s B A, what the adapter adds to the base weight: float32 or wider, the weight's shape."""
        a, b = self.lora_a.bring(name).detach(), self.lora_b.bring(name).detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        return self.product(a.to(wide), b.to(wide)).mul_(self.adapters[name].scaling)

    def delta_bound(self, name: str) -> float:
        """Return what no element of delta(name) exceeds, or infinity where B A may overflow on the way to it."""
        a, b = self.lora_a.bring(name).detach(), self.lora_b.bring(name).detach()
        if not (a.numel() and b.numel()):
            return 0.0
        adapter = self.adapters[name]
        bound = max(1.0, abs(adapter.scaling)) * adapter.rank * float(a.abs().amax()) * float(b.abs().amax())
        # not where it is NaN
        return bound if bound < torch.finfo(torch.promote_types(a.dtype, torch.float32)).max / 2 else math.inf

    def shift_weight(self, lora_a: Tensor, lora_b: Tensor, factor: float) -> None:
        """W <- W + factor B A, computed in float32 or wider and rounded once."""
        device = self.weight.device
        wide = torch.promote_types(torch.promote_types(self.weight.dtype, lora_a.dtype), torch.float32)
        product = self.product(lora_a.to(device, wide), lora_b.to(device, wide))
        self.write_weight(self.read_weight().to(wide) + factor * product)

    def extra_repr(self) -> str:
        parts = [f"{name}: r={a.rank}, scaling={a.scaling:g}" for name, a in self.adapters.items()]
        state = "merged" if self.merged else "active"
        names = self.merged.names if self.merged else self.active
        return "; ".join([*parts, f"{state}={list(names)}"])
