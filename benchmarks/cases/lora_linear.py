"""A LoRA linear layer: forward, backward with gradients of x, A and B, and both. bfloat16 on a GPU, float32 on a CPU.

Beside it PEFT's layer, on a GPU unsloth's, the formula in plain PyTorch as written ("reference") and under
torch.compile ("compiled"), and for scale the frozen product alone ("matmul"). On a GPU the forward runs by either path
of the kernels too, with the fused product and with a library's ("lora_core fused", "lora_core library"), without the
operation around them.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.modes import Work
from benchmarks.peers import Peer, providers
from benchmarks.shapes import LLAMA_3_LINEARS, SMALL_LINEARS

SHAPES = SMALL_LINEARS
GPU_SHAPES = LLAMA_3_LINEARS

SCALING = 2.0


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode, for M tokens, W [N, K] and rank R."""
    import torch
    from torch import nn

    import lora_core as lc
    from lora_core.reference import lora as reference

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b, d_y = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,), (r, k), (n, r), (m, n))
    )
    leaves = (x.requires_grad_(), nn.Parameter(lora_a), nn.Parameter(lora_b))
    operands = (x, weight, bias, *leaves[1:], SCALING)

    def written(x: Any, a: Any, b: Any) -> Any:
        return reference.lora_linear(x, weight, bias, a, b, SCALING)

    ours: dict[str, Callable[..., Any]] = {
        "lora_core": lambda x, a, b: lc.lora_linear(x, weight, bias, a, b, SCALING),
        "reference": written,
    }
    peers = {
        "compiled": modes.compiled_peer(written, device),
        "peft": Peer(("peft",), lambda: on_x(peft_layer(linear_of(weight, bias), leaves[1:], SCALING))),
        "unsloth": unsloth_peer(lambda: (weight, None), bias, device),
    }
    layers, missing = providers(ours, peers)
    works = {name: Work(run, leaves, modes.lora_truth, operands, m + n + k + r) for name, run in layers.items()}
    works["matmul"] = Work(
        lambda x: nn.functional.linear(x, weight, bias), (x,), modes.linear_truth, (x, weight, bias), n + k
    )
    forced = {}
    if device != "cpu":
        runs = forced_paths(weight, bias)
        forced = {name: Work(run, leaves, modes.lora_truth, operands, m + n + k + r) for name, run in runs.items()}
    for mode in modes.MODES:
        # a path is forced on the forward alone
        those = {**works, **forced} if mode == "fwd" else works
        yield Case(
            op="lora_linear",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(those, mode, d_y),
            check=modes.check(those, mode, d_y),
            bytes_moved=dtype.itemsize * (n * k + moved_beside_weights(shape, mode) + bias_moved(shape, mode)),
            flops=flops(shape, mode),
            claims=tuple(Claim(against=name, no_slower=True) for name in ("reference", "peft")),
            note="bias",
            missing=missing,
        )


def forced_paths(weight: Any, bias: Any) -> dict[str, Callable[..., Any]]:
    """Return the forward of the kernels by each path that a linear layer may take."""
    from lora_core.kernels.crossover import PATHS
    from lora_core.kernels.lora_linear import launch_lora_linear

    def by(path: str) -> Callable[..., Any]:
        return lambda x, a, b: launch_lora_linear(x, weight, bias, a, b, SCALING, 0.0, None, path)[0]

    return {f"lora_core {path}": by(path) for path in PATHS}


def moved_beside_weights(shape: dict[str, int], mode: str, layers: int = 1) -> int:
    """Elements that layers of one x read and write at least, besides W and the bias, each once.

    Forward x, A, B and y; backward dL/dy, x, A, B and the gradients of these three. Both together read x, A and B once,
    as a cache may hold them.
    """
    m, n, k, r = (shape[name] for name in "MNKR")
    pairs, y = layers * r * (n + k), layers * m * n
    forward, backward = y, y + m * k + pairs
    return m * k + pairs + {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[mode]


def bias_moved(shape: dict[str, int], mode: str) -> int:
    """Elements of a frozen bias that are read: a backward does without."""
    return 0 if mode == "bwd" else shape["N"]


def flops(shape: dict[str, int], mode: str) -> int:
    """Operations of a LoRA layer, at least: forward; backward without dW, but with dA and dB.

    By the cheapest of three ways: products of low rank; W + s B A made first, which x and dL/dy are multiplied with;
    that, and dA and dB of the dense gradient of W. A backward is given what its forward has of low rank, S.
    """
    m, n, k, r = (shape[name] for name in "MNKR")
    product, low, merge = m * n * k, m * r * (n + k), n * k * r
    ways = {
        "fwd": (product + low, product + merge),
        "bwd": (product + 2 * low, product + merge + low + m * r * n, 2 * product + 3 * merge),
        "fwdbwd": (2 * product + 3 * low, 2 * product + merge + 2 * low, 3 * product + 3 * merge),
    }
    return 2 * min(ways[mode])


def unsloth_peer(held: Callable[[], tuple[Any, Any]], bias: Any, device: str) -> Peer:
    """Return unsloth's LoRA product, which has no bias and takes a batch of sequences.

    Args:
        held: returns W and its QuantState of bitsandbytes', or None for a dense W.
        bias: shape [N].
        device: of all of them; unsloth does not start without a GPU.
    """

    def layer() -> Callable[..., Any]:
        from unsloth.kernels.fast_lora import LoRA_W

        weight, state = held()
        return lambda x, a, b: LoRA_W.apply(x[None], weight, state, a, b, SCALING)[0] + bias

    return Peer(("unsloth",), layer, unfit="needs a GPU" if device == "cpu" else "")


def on_x(layer: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a layer that holds its adapter as one that is given A and B too."""
    return lambda x, a, b: layer(x)


def linear_of(weight: Any, bias: Any) -> Any:
    """Return nn.Linear with these tensors, frozen."""
    from torch import nn

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def peft_layer(base: Any, pair: tuple[Any, Any], scaling: float, dropout: float = 0.0) -> Any:
    """Return PEFT's LoRA on a layer, with these two parameters as A and B."""
    import peft
    from torch import nn

    rank = len(pair[0])
    config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, lora_dropout=dropout, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = pair
    return layer
