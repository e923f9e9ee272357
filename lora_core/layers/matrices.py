"""The matrices of a layer's adapters, and what others may have done to one: offloaded it, pruned it, computed it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# what pruning and weight norm hold in place of a parameter
HELD_INSTEAD = ("_orig", "_g", "_v")


class Matrices(nn.ParameterDict):
    """A, or B, of every adapter by name.

    Called for one, which PyTorch's own refuses, so that hooks run: those of offloading bring its values, those of
    pruning and weight norm compute them.
    """

    __call__ = nn.Module.__call__

    def forward(self, name: str) -> Tensor:
        matrix: Tensor = self[name]
        return matrix

    def bring(self, name: str) -> Tensor:
        """Return one adapter's matrix, by a call, which is slower, only where a hook or another forward makes it."""
        if "forward" in self.__dict__ or (self._forward_pre_hooks and self._computing(name)):
            brought: Tensor = self(name)
            return brought
        matrix = self._parameters.get(name)
        # one that is computed, by a parametrisation, is kept elsewhere
        return self[name] if matrix is None else matrix

    def held(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that an adapter's matrix is, or is computed from."""
        endings = HELD_INSTEAD if self._computing(name) else ("",)
        own = (self._parameters.get(name + ending) for ending in endings)
        yield from (parameter for parameter in own if parameter is not None)
        if parametrize.is_parametrized(self, name):
            yield from self.parametrizations[name].parameters()  # type: ignore[union-attr, index]

    def settle(self, name: str) -> None:
        """Make an adapter's matrix that is computed a parameter again, of the values that it has."""
        if parametrize.is_parametrized(self, name):
            parametrize.remove_parametrizations(self, name)
        for key, hook in self._computing(name).items():
            del self._forward_pre_hooks[key]
            hook.remove(self)

    def is_plain(self, name: str) -> bool:
        """Say whether an adapter's matrix is a parameter, not computed at each use."""
        return name in self._parameters

    def _computing(self, name: str) -> dict[int, Any]:
        """Return the hooks of pruning, weight norm or spectral norm that compute an adapter's matrix before a call."""
        return {
            key: hook
            for key, hook in self._forward_pre_hooks.items()
            if name in (getattr(hook, "_tensor_name", None), getattr(hook, "name", None)) and hasattr(hook, "remove")
        }
