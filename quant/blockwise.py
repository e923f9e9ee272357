"""Block-wise quantisation: each run of block_size elements is divided by its largest magnitude.

    absmax_j = max |x_i| over block j         code_i = nearest level to x_i / absmax_j        x_i ~ level_i absmax_j

Blocks run over the flattened tensor in row-major order and may straddle rows; the last may be short. One outlier
spoils its own block only. Source: Dettmers et al. 2021 (arXiv 2110.02861), section 2.1.
"""

import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lora_core.errors import ConfigError, DtypeError, NonFiniteError
from lora_core.quant.codebook import Codebook

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_blocks(x: Tensor, book: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax) of x.

    A block of zeros has absmax 0 and the code of zero.

    Args:
        x: float32, float16 or bfloat16 of any shape and strides.
        book: the levels.
        block_size: elements per scale.
    Returns:
        codes uint8 [n], one a byte, and absmax float32 [ceil(n / block_size)].
    """
    flat = x.reshape(-1).float()
    n = flat.numel()
    blocks = -(-n // block_size)
    # the short last block is filled with zeros, which no maximum of magnitudes sees
    padded = torch.cat([flat, flat.new_zeros(blocks * block_size - n)]).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1) if n else flat.new_zeros(0)
    divisor = torch.where(absmax == 0, 1, absmax)
    return book.encode(padded / divisor[:, None]).reshape(-1)[:n], absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, book: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return level * absmax, multiplied in float32 and rounded once to dtype.

    Args:
        codes: uint8 [n].
        absmax: float32 [ceil(n / block_size)].
        book: the levels.
        block_size: elements per scale.
        dtype: of the result.
    Returns:
        Shape [n].
    """
    scale = absmax.repeat_interleave(block_size)[: codes.numel()]
    return (book.decode(codes) * scale).to(dtype)


def check_input(x: Tensor) -> None:
    """Raise unless x can be quantised.

    Raises:
        DtypeError: if x is not float32, float16 or bfloat16, or sparse.
        NonFiniteError: if x holds NaN or infinity, naming the first place.
    """
    if x.dtype not in DTYPES:
        raise DtypeError(
            f"cannot quantise {x.dtype}: want {', '.join(map(str, DTYPES))}; cast the weight first, e.g. with .float()"
        )
    check_finite(x, "a weight to quantise")


def check_finite(x: Tensor, what: str) -> None:
    """Raise NonFiniteError if x holds NaN or infinity, naming the first place; waits for a GPU."""
    if x.layout != torch.strided:
        raise DtypeError(f"cannot quantise a tensor of layout {x.layout}: want a dense one, e.g. weight.to_dense()")
    if not has_values(x):
        return
    # two numbers decide: aminmax passes NaN on
    low, high = x.aminmax()
    if not (low.isfinite() and high.isfinite()):
        finite = x.isfinite()
        where = (~finite).nonzero()
        index = tuple(where[0].tolist())
        raise NonFiniteError(
            f"{what} holds {x[index].item()} at index {index}, and {len(where)} non-finite values in "
            "all: one would spoil its whole block; repair it or leave it out"
        )


def has_values(x: Tensor) -> bool:
    """Say whether there are values to look at: some, neither on the meta device nor faked."""
    return not (x.is_meta or isinstance(x, FakeTensor)) and x.numel() > 0


def check_block_size(owner: str, block_size: object) -> int:
    """Return block_size as an int.

    Raises:
        ConfigError: unless it is a power of two from 32 to 4096; 64.0 is none.
    """
    whole = _index(block_size)
    if whole not in BLOCK_SIZES:
        raise ConfigError(f"{owner}: block_size is {block_size!r}; want one of {', '.join(map(str, BLOCK_SIZES))}")
    return whole


def check_nested_block_size(owner: str, block_size: object) -> int:
    """Return block_size, scales sharing one second-level scale, as an int.

    Raises:
        ConfigError: unless it is a whole number of at least 1; 256.0 is none.
    """
    whole = _index(block_size)
    if not 1 <= whole < 2**63:
        raise ConfigError(
            f"{owner}: nested_block_size is {block_size!r}; want a whole number of at least 1, as a rule 256"
        )
    return whole


def _index(value: object) -> int:
    """Return a whole number of any kind as an int, and 0 for what is none."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return 0
