"""How often kernels are compiled, over many numbers of tokens, and for which GPUs: what Triton says without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import codegen

ROOT = Path(__file__).resolve().parent.parent
# compiled at most so often for all numbers of tokens: tiles of few and many rows, whole and split sums
# (split_sum, to which one row must not be a case of its own: sizes that are multiples of 16, and others)
MOST, MOST_OF_SUMS = 4, 2
# shared memory of a program at most, by the least of the GPUs since compute capability 8.0: 8.6, 8.9 and 12.0
# (CUDA C++ Programming Guide, technical specifications per compute capability)
SHARED_BYTES = 99 * 1024
# what takes most of it
LARGEST = {
    "shrink": ("bf16 bf16 64x128 dropout", "fp16 fp16 64x64 dropout"),
    "low_rank_matmul": ("bf16 bf16 128x128x64 rank 32 transposed",),
    "row_sum": ("bf16 bf16 rank 64 transposed dropout",),
}

# prints, for every kernel file and way of calling, how many different launches Triton would compile for
PROGRAM = """
import importlib, itertools, json, random
import torch
import lora_core as lc
from benchmarks import codegen
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

backend = CUDABackend(GPUTarget("cuda", 90, 32))
keys = {}


binders = {}


def recorded(form, grid):
    kernel = form.kernel
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)

    def launch(*args, **kwargs):
        _, specialization, options = binders[kernel](*args, **kwargs)
        file = kernel.fn.__module__.rpartition(".")[2]
        keys.setdefault((file, use), set()).add(str((specialization, sorted(options.items()))))

    return launch


importlib.import_module("lora_core.kernels.form").Form.__getitem__ = recorded
processors = importlib.import_module("lora_core.kernels.processors")
processors.processors = lambda device: 132
files = (
    "lora_linear", "nf4_lora_linear", "grouped_lora", "nf4_quantize", "nf4_dequantize", "absmax_quantize",
    "absmax_dequantize", "dora_norm", "rms_norm", "rotary", "swiglu",
)
kernels = [importlib.import_module(f"lora_core.kernels.{file}") for file in files]
launches = {name: getattr(k, name) for k in kernels for name in vars(k) if name.startswith("launch_")}

N, K = 528, 1040
many = [*range(1, 140), *range(140, 20000, 977), *(2**i + d for i in range(7, 14) for d in (-1, 0, 1)), 20000]
seed, weight = torch.tensor([5]), torch.randn(N, K).bfloat16()
codes, absmax = torch.zeros(N * K // 2, 1, dtype=torch.uint8), torch.ones(N * K // 64)
packed = (codes, absmax, None, None, (N, K), 64, 256)
queries, angles = torch.zeros(1, 20000, 8, 128).bfloat16(), torch.zeros(1, 20000, 128).bfloat16()
gates = torch.zeros(2, 20000, N, dtype=torch.bfloat16)
x_all, d_all = torch.zeros(20000, K, dtype=torch.bfloat16), torch.zeros(20000, N, dtype=torch.bfloat16)
for r, m in itertools.product((1, 16, 100), many):
    a, b = torch.zeros(r, K, dtype=torch.bfloat16), torch.zeros(N, r, dtype=torch.bfloat16)
    x, d_y, hidden = x_all[:m], d_all[:m], a.new_zeros(m, r)
    use = f"dense r={r}"
    launches["launch_lora_linear"](x, weight, None, a, b, 0.5, 0.0, None, path="fused")
    use = f"dense backward r={r}"
    rest = (a, b, hidden, 0.5, 0.0, None)
    needs = (True, False, True, True, True)
    launches["launch_lora_linear_backward"](d_y, x, weight, *rest, needs, path="fused")
    use = f"nf4 r={r}"
    launches["launch_nf4_lora_linear"](x, *packed, None, a, b, 0.5, 0.0, None, path="fused", panel_bytes=2**30)
    use = f"nf4 backward r={r}"
    launches["launch_nf4_lora_linear_backward"](d_y, x, *packed, *rest, (True,) * 4, path="fused", panel_bytes=1)
    ranks, adapter, scaling = [r // 2, r - r // 2], torch.zeros(m, dtype=torch.int64), torch.ones(2)
    widest = a.new_zeros(m * max(ranks))
    use = f"grouped r={r}"
    launches["launch_grouped_lora"](x, d_y, a, b, ranks, adapter, scaling)
    use = f"grouped backward r={r}"
    launches["launch_grouped_lora_backward"](d_y, x, a, b, ranks, adapter, scaling, widest, (True,) * 3)
for m in many:
    gate, up = gates[:, :m]
    x, of_tokens = queries[:, :m].transpose(1, 2), angles[:, :m]
    use = "forward"
    launches["launch_rms_norm"](x_all[:m], weight[0], 1e-6)
    launches["launch_rotary"](x, of_tokens, of_tokens)
    launches["launch_swiglu"](gate, up)
    use = "backward"
    launches["launch_rms_norm_backward"](x_all[:m], x_all[:m], weight[0], torch.zeros(m), True)
    launches["launch_rotary_backward"](x, of_tokens, of_tokens)
    launches["launch_swiglu_backward"](gate, gate, up)
use = "weight"
for n in (N, 2 * N, 7 * N):
    w = torch.zeros(n, K)
    launches["launch_nf4_quantize"](w, 64)
    halves = torch.zeros(n * K // 2, 1, dtype=torch.uint8), torch.ones(n * K // 64)
    launches["launch_nf4_dequantize"](*halves, None, None, (n, K), torch.bfloat16, 64)
    scales, offset = torch.ones(n * K // 64), torch.zeros(())
    launches["launch_absmax_quantize"](scales, offset, 256)
    launches["launch_absmax_dequantize"](torch.zeros(n, dtype=torch.uint8), torch.ones(n), offset, 256)
    launches["launch_dora_norm"](w, torch.zeros(4, K), torch.zeros(n, 4), 0.5)
print(json.dumps([[file, use, len(found)] for (file, use), found in keys.items()]))
"""


# prints, for every configuration named, the bytes of shared memory that a program takes
SHARED = """
import json, sys
from benchmarks import codegen
for kernel, names in json.loads(sys.argv[1]).items():
    chosen = [variant for variant in codegen.variants_of(kernel) if variant.name in names]
    print(json.dumps([[variant.name, codegen.build(variant, 89).metadata.shared] for variant in chosen]))
"""


def run(program, *arguments):
    """The lines that a program prints where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_kernels_fit_the_shared_memory_of_every_gpu():
    """Else a launch is refused on them: what an A100 has room for, an RTX 4090 may not have."""
    found = [row for line in run(SHARED, json.dumps(LARGEST)) for row in json.loads(line)]
    assert len(found) == sum(map(len, LARGEST.values()))
    assert [row for row in found if row[1] > SHARED_BYTES] == []


def test_kernels_are_compiled_a_few_times_for_all_numbers_of_tokens():
    found = json.loads(run(PROGRAM)[-1])
    assert {file for file, *_ in found} == set(codegen.kernel_names())
    assert [row for row in found if row[2] > (MOST_OF_SUMS if row[0] == "split_sum" else MOST)] == []
