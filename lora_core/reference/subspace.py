"""Training in a random subspace: how many directions a task needs.

All D parameters follow d coordinates z,

    theta = theta_0 + P z,        P [D, d],  P^T P = I

and only z is trained; by the chain rule dL/dz = P^T dL/dtheta. The smallest d that reaches 90% of what training all
parameters gains is the intrinsic dimension d_90 of the task.

P here gives each parameter one coordinate, drawn at random, and a random sign: one entry a row, +-1 / sqrt(n_j) where
n_j parameters share coordinate j. Its columns are orthonormal, it needs 2 D numbers, and a product takes D operations.

Source: Li et al. 2018 (arXiv 1804.08838), section 2, with dense, sparse and Fastfood P; Aghajanyan et al. 2020
(arXiv 2012.13255) for language models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import ConfigError


class Subspace:
    """A random subspace of the space of some parameters.

    Args:
        parameters: theta_0, of any shapes, D numbers in all; copied, and left as they are.
        dimension: d, from 1 to D.
        seed: of the drawing.
    Raises:
        ConfigError: if dimension is not in that range.
    """

    def __init__(self, parameters: Sequence[Tensor], dimension: int, seed: int = 0) -> None:
        self.start = [p.detach().clone() for p in parameters]
        count = sum(p.numel() for p in self.start)
        if not 1 <= dimension <= count:
            raise ConfigError(f"Subspace: dimension is {dimension}; want 1 to {count}, the number of parameters")
        self.dimension = dimension
        generator = torch.Generator().manual_seed(seed)
        # every coordinate gets a parameter, the other parameters draw theirs
        drawn = torch.cat(
            [torch.arange(dimension), torch.randint(dimension, (count - dimension,), generator=generator)]
        )
        index = drawn[torch.randperm(count, generator=generator)]
        sign = torch.randint(2, (count,), generator=generator) * 2 - 1
        entry = sign / index.bincount(minlength=dimension).double().sqrt()[index]
        sizes = [p.numel() for p in self.start]
        self._index, self._entry = index.split(sizes), entry.float().split(sizes)

    def point(self, z: Tensor) -> list[Tensor]:
        """Return theta_0 + P z, in the parameters' shapes and dtypes.

        Args:
            z: float32 of shape [d].
        """
        return [
            start + (z[index] * entry).view_as(start).to(start.dtype)
            for start, index, entry in zip(self.start, self._index, self._entry, strict=True)
        ]

    def gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return dL/dz = P^T dL/dtheta, float32 of shape [d].

        Args:
            gradients: dL/dtheta, in the parameters' shapes.
        """
        total = torch.zeros(self.dimension, dtype=torch.float32)
        for gradient, index, entry in zip(gradients, self._index, self._entry, strict=True):
            total.index_add_(0, index, gradient.reshape(-1).float() * entry)
        return total
