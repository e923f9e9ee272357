"""A LoRA linear layer: forward, backward with gradients of x, A and B, and both. bfloat16 on a GPU, float32 on a CPU.

Beside it PEFT's layer, the formula in plain PyTorch as written ("reference") and under torch.compile ("compiled"), and
for scale the frozen product alone ("matmul"). On a GPU the forward runs by either path of the kernels too, with
the fused product and with a library's ("lora_core fused", "lora_core library"), without the operation around them.
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
    compiled = modes.compiled(reference.lora_linear)
    ours: dict[str, Callable[..., Any]] = {
        "lora_core": lambda x, a, b: lc.lora_linear(x, weight, bias, a, b, SCALING),
        "reference": lambda x, a, b: reference.lora_linear(x, weight, bias, a, b, SCALING),
        "compiled": lambda x, a, b: compiled(x, weight, bias, a, b, SCALING),
    }
    peers = {"peft": Peer(("peft",), lambda: on_x(peft_layer(linear_of(weight, bias), leaves[1:], SCALING)))}
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
        moved = x.numel() + weight.numel() + m * n
        yield Case(
            op="lora_linear",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(those, mode, d_y),
            check=modes.check(those, mode, d_y),
            bytes_moved=dtype.itemsize * moved * (2 if mode == "fwdbwd" else 1),
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


def flops(shape: dict[str, int], mode: str) -> int:
    """Operations of a LoRA layer: forward; backward without dW, but with dA and dB."""
    m, n, k, r = (shape[name] for name in "MNKR")
    forward, backward = 2 * m * (n * k + r * (n + k)), 2 * m * (n * k + 2 * r * (n + k))
    return {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[mode]


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


def peft_layer(base: Any, pair: tuple[Any, Any], scaling: float) -> Any:
    """Return PEFT's LoRA on a layer, with these two parameters as A and B."""
    import peft
    from torch import nn

    rank = len(pair[0])
    config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = pair
    return layer
