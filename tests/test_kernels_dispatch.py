"""The kernels behind their operations: autograd, opcheck and the self-check, run by the interpreter as on a GPU.

In a process of its own the kernels are registered for CPU tensors; a GPU has them registered anyway.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

REGISTER = """
import importlib
import torch
import lora_core as lc
from lora_core import doctor

device = "cuda" if torch.cuda.is_available() else "cpu"
files = {
    "nf4_quantize": {"op": "launch_nf4_quantize"},
    "nf4_dequantize": {"op": "launch_nf4_dequantize"},
    "absmax_quantize": {"op": "launch_absmax_quantize"},
    "absmax_dequantize": {"op": "launch_absmax_dequantize"},
    "lora_linear": {"op": "launch_lora_linear", "backward_op": "launch_lora_linear_backward"},
    "lora_linears": {"op": "launch_lora_linears", "backward_op": "launch_lora_linears_backward"},
    "nf4_lora_linear": {"op": "launch_nf4_lora_linear", "backward_op": "launch_nf4_lora_linear_backward"},
    "dora_norm": {"op": "launch_dora_norm", "nf4_op": "launch_nf4_dora_norm"},
    "grouped_lora": {"op": "launch_grouped_lora", "backward_op": "launch_grouped_lora_backward"},
    "rms_norm": {"op": "launch_rms_norm", "backward_op": "launch_rms_norm_backward"},
    "rotary": {"op": "launch_rotary", "backward_op": "launch_rotary_backward"},
    "swiglu": {"op": "launch_swiglu", "backward_op": "launch_swiglu_backward"},
}
from lora_core.ops.eager import register
launched = set()


def counted(name, launch):
    def run(*args, **kwargs):
        launched.add(name)
        return launch(*args, **kwargs)

    return run


for file, launches in files.items():
    ops, kernels = (importlib.import_module(f"lora_core.{where}.{file}") for where in ("ops", "kernels"))
    for op, launch in launches.items():
        register(getattr(ops, op), device, counted(f"{file}.{op}", getattr(kernels, launch)))

"""

SUBSETS = (
    REGISTER
    + """
import itertools
from lora_core.ops.grouped_lora import grouped_lora
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linears import lora_linears
from lora_core.ops.rms_norm import rms_norm
from lora_core.ops.rotary import rotary
from lora_core.ops.swiglu import swiglu

make = lambda *shape: torch.randn(*shape).to(device)
adapter, scaling = torch.tensor([0, 1, -1, 0, 1, 1], device=device), torch.ones(2, device=device)


def differentiate(name, dtype, needs, run, *operands):
    leaves = [t.to(dtype).requires_grad_(need) for t, need in zip(operands, needs)]
    run(*leaves).sum().backward()
    made = [t.grad is not None and t.grad.shape == t.shape for t in leaves]
    assert made == list(needs), (name, dtype, needs, made)


for dtype, needs in itertools.product((torch.float32, torch.float64), itertools.product((False, True), repeat=4)):
    if not any(needs):
        continue
    x, bias, a, b, weight = make(6, 8), make(4), make(5, 8), make(4, 5), make(4, 8).to(dtype)
    q = lc.quantize_nf4(weight.float())
    linear = lambda x, bias, a, b: lc.lora_linear(x, weight, bias, a, b, 0.5)
    differentiate("lora_linear", dtype, needs, linear, x, bias, a, b)
    packed = lambda x, bias, a, b: lc.nf4_lora_linear(x, q, bias, a, b, 0.5)
    differentiate("nf4_lora_linear", dtype, needs, packed, x, bias, a, b)
    if not needs[1]:
        own = (needs[0], *needs[2:])
        grouped = lambda x, a, b: grouped_lora(x, a, b, [2, 3], adapter, scaling)
        differentiate("grouped_lora", dtype, own, grouped, x, a, b)
        several = lambda x, a, b: sum(lora_linears(x, [Layer(weight, None, a, b, 0.5)] * 2))
        differentiate("lora_linears", dtype, own, several, x, a, b)
    if needs == (True, False, False, False):
        differentiate("rotary", dtype, needs[:3], rotary, make(2, 3, 5, 8), make(2, 5, 8), make(2, 5, 8))
    if needs[:2] == (False, False):
        norm = lambda x, weight: rms_norm(x, weight, 1e-6)
        differentiate("rms_norm", dtype, needs[2:], norm, make(6, 8), make(8))
        differentiate("swiglu", dtype, needs[2:], swiglu, make(6, 8), make(6, 8))
print("sound")
"""
)

PROGRAM = (
    REGISTER
    + """
failed = [check for check in doctor.self_check(device) if not check.passed]
assert not failed, failed

g = torch.Generator().manual_seed(0)
make = lambda *shape: torch.randn(*shape, generator=g).to(device)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    x, w, b, lora_a, lora_b = (t.to(dtype) for t in (make(2, 3, 40), make(9, 40), make(9), make(3, 40), make(9, 3)))
    q = lc.quantize_nf4(w.float())
    packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, list(q.shape), 64, 256)
    for t in (x, lora_a, lora_b):
        t.requires_grad_()
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(torch.ops.lora_core.lora_linear, (x, w, b, lora_a, lora_b, 0.5, 0.3, seed))
    torch.library.opcheck(torch.ops.lora_core.nf4_lora_linear, (x, *packed, b, lora_a, lora_b, 0.5, 0.3, seed))
    adapter, scaling = torch.tensor([0, 1, -1, 0, 1, 1], device=device), torch.ones(2, device=device)
    flat = x.detach().reshape(6, 40).requires_grad_()
    torch.library.opcheck(torch.ops.lora_core.grouped_lora, (flat, None, lora_a, lora_b, [1, 2], adapter, scaling))
    plain = [t.detach() for t in (lora_a, lora_b)]
    torch.library.opcheck(torch.ops.lora_core.dora_norm, (w, *plain, 0.5))
    torch.library.opcheck(torch.ops.lora_core.nf4_dora_norm, (*packed, dtype, *plain, 0.5))
    gate, up = (make(2, 3, 40).to(dtype).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.lora_core.swiglu, (gate, up))
    torch.library.opcheck(torch.ops.lora_core.rms_norm, (gate, make(40).to(dtype).requires_grad_(), 1e-6))
    angles = (make(1, 3, 8).to(dtype), make(1, 3, 8).to(dtype))
    torch.library.opcheck(torch.ops.lora_core.rotary, (make(2, 5, 3, 8).to(dtype).requires_grad_(), *angles))
torch.library.opcheck(torch.ops.lora_core.nf4_dequantize, (*packed[:5], torch.bfloat16, 64))
torch.library.opcheck(torch.ops.lora_core.nf4_quantize, (make(9, 40), 64))
missing = {f"{file}.{op}" for file, ops in files.items() for op in ops} - launched
assert not missing, missing

# a model trained through the kernels, 4 bits and dropout and all
model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.GELU(), torch.nn.Linear(24, 8)).to(device)
lc.quantize_model(model, skip_modules=["2"])
lc.add_adapter(model, lc.LoraConfig(r=3, lora_dropout=0.2, target_modules="all-linear"))
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
x, want = make(70, 40), make(70, 8)
losses = []
for _ in range(12):
    loss = (model(x) - want).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
assert losses[-1] < 0.95 * losses[0], losses
print("sound")
"""
)


def test_kernels_are_registered_for_a_gpu_and_not_imported_before_their_first_call():
    """As import lora_core does where PyTorch is built for CUDA, without asking for a GPU, which would start CUDA."""
    program = """
import sys
import torch
torch.version.cuda = "13.0"
def asked():
    raise AssertionError("a GPU was asked for")
torch.cuda.is_available = torch.cuda.device_count = asked
import lora_core as lc
from lora_core import backends
dense = ("lora_linear", "lora_linear_backward", "dora_norm", "rms_norm", "rotary", "rotary_backward", "swiglu")
for name in (*dense, "nf4_dequantize", "nf4_dora_norm", "grouped_lora"):
    file = "dora_norm" if name == "nf4_dora_norm" else name.removesuffix("_backward")
    assert backends.implementation(name, "cuda") == f"lora_core.kernels.{file}"
    assert backends.implementation(name, "cpu") in ("reference", f"lora_core.cpu.{file}")
for op in ("op", "backward_op"):
    assert "cuda" in getattr(sys.modules["lora_core.ops.lora_linear"], op)._backend_fns
assert not any(name.startswith(("lora_core.kernels", "triton")) for name in sys.modules)
lc.quantize_nf4(torch.randn(4, 8)).dequantize()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_operations_run_by_the_reference_where_triton_cannot_launch_anything():
    """As in an image without a C compiler: said once, for every operation, and not raised."""
    program = """
import warnings
import torch
torch.version.cuda = "13.0"
import lora_core as lc
from lora_core import backends
from lora_core.ops import lora_linear, nf4_quantize
from lora_core.reference import lora
from triton.runtime.driver import driver
def without_a_compiler(_):
    raise RuntimeError("Failed to find C compiler.")
type(driver).active = property(without_a_compiler)
first = lora_linear.op._backend_fns["cuda"]

x, w, b, a_, b_ = (torch.randn(*s) for s in ((3, 8), (5, 8), (5,), (2, 8), (5, 2)))
args = (x, w, b, a_, b_, 0.5, 0.0, None)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for module, given in ((lora_linear, args), (nf4_quantize, (w, 64))):
        # what the dispatcher calls for a tensor on a GPU
        module.op._backend_fns["cuda"](*given)
    # in another thread, which was on its way to the first call
    assert torch.equal(first(*args)[0], lc.lora_linear(*args))
message, = map(str, (w.message for w in said))
assert "RuntimeError: Failed to find C compiler" in message and "apt-get install gcc" in message, message
for name in ("lora_linear", "nf4_quantize"):
    assert backends.implementation(name, "cuda") == "reference"
assert backends.implementation("dora_norm", "cuda") == "lora_core.kernels.dora_norm"
assert torch.equal(lora_linear.op._backend_fns["cuda"](*args)[0], lora.forward(*args)[0])
torch.cuda.is_available = lambda: True
assert "Failed to find C compiler" in backends.why_no_kernels()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("path", ["library", "fused"])
def test_kernels_behind_their_operations_are_sound(path, tmp_path):
    """Both ways a linear layer can go, as a table of measurements has it."""
    times = (1.0, 2.0) if path == "fused" else (2.0, 1.0)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sizes = ', "m": 1, "n": 1, "k": 1, "r": 1, '
    rows = [
        f'{{"device": "{device}", "dtype": "{dtype}"{sizes} "fused_ms": {times[0]}, "library_ms": {times[1]}}}'
        for dtype in ("float32", "bfloat16")
    ]
    table = tmp_path / "crossover.json"
    table.write_text(f"[{', '.join(rows)}]")
    check(PROGRAM, LORA_CORE_CROSSOVER=str(table))


def test_kernels_behind_their_operations_make_every_subset_of_the_gradients():
    check(SUBSETS)


def check(program, **variables):
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | variables | interpreted
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith("sound"), run.stderr[-3000:]
