"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m benchmarks.codegen --kernel nf4_dequantize --arch 90

Compiles every configuration a kernel can be launched with, by the Triton installed, and reads the machine code back
with the tools Triton's wheel carries. Must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine_code import count, listings, resources

ARCHITECTURES = (80, 90, 100)
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
WARP = 32
# exact and approximate quotients, fused multiply-adds, matrix instructions of sm_90 and sm_80, asynchronous copies
PTX = ("div.rn.f32", "div.full.f32", "div.approx.f32", "fma.rn.f32", "wgmma.mma_async", "mma.sync", "cp.async")


@dataclass(frozen=True)
class Compiled:
    """One configuration compiled for one architecture.

    Args:
        kernel: the kernel's file.
        variant: the configuration's name.
        arch: 80, 90 or 100.
        registers: of a thread.
        stack_bytes: of a thread.
        spill_bytes: local memory of a thread; not 0 where registers did not suffice.
        shared_bytes: of a program.
        instructions: of the whole kernel, by the first word of their names.
        accesses: global loads and stores by width, such as "LDG.128".
        ptx: how often some operations stand in the intermediate code, before the assembler.
        tile_m: rows of the tiles that tensor cores multiply; 0 where none do.
        per_element: instructions of all threads over the elements a program makes; None where that says nothing.
    """

    kernel: str
    variant: str
    arch: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    accesses: dict[str, int]
    ptx: dict[str, int]
    tile_m: int
    per_element: float | None

    @property
    def total(self) -> int:
        """All instructions but the padding behind the last."""
        return sum(self.instructions.values())


def kernel_names() -> list[str]:
    """The files of kernels/ that list variants."""
    return [path.stem for path in sorted(KERNELS.glob("*.py")) if "def variants(" in path.read_text()]


def variants_of(name: str) -> list[Any]:
    """Every configuration a kernel file can launch."""
    import lora_core  # noqa: F401  (makes lora_core.kernels importable from a checkout)

    return list(importlib.import_module(f"lora_core.kernels.{name}").variants())


def build(variant: Any, arch: int) -> Any:
    """Compile one configuration for one architecture; return Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_core.kernels.form import ALIGNMENT

    arguments = variant.kernel.arg_names
    constants = {(arguments.index(a),): value for a, value in variant.constant.items()}
    aligned = {(arguments.index(a),): [["tt.divisibility", ALIGNMENT]] for a in sorted(variant.aligned)}
    source = ASTSource(fn=variant.kernel, signature=variant.signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=dict(variant.options))


def compile_variants(name: str, variants: Sequence[Any], arch: int) -> list[Compiled]:
    """Compile configurations of a kernel for one architecture and count what came out of each."""
    built = [build(variant, arch) for variant in variants]
    texts = listings([b.asm["cubin"] for b in built], arch)
    return [counted(name, *of_one, arch) for of_one in zip(variants, built, texts, strict=True)]


def counted(name: str, variant: Any, built: Any, text: str, arch: int) -> Compiled:
    """Count what came out of a configuration: `built` is what build returns, `text` its machine code."""
    usage = resources(built.asm["cubin"])
    instructions, accesses = count(text)
    threads = WARP * built.metadata.num_warps
    return Compiled(
        kernel=name,
        variant=variant.name,
        arch=arch,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spill_bytes=usage["LOCAL"],
        shared_bytes=built.metadata.shared,
        instructions=dict(instructions),
        accesses=dict(accesses),
        ptx={name: len(re.findall(rf"\b{re.escape(name)}\b", built.asm["ptx"])) for name in PTX},
        tile_m=variant.tile_m,
        per_element=instructions.total() * threads / variant.weights if variant.weights else None,
    )


def interpreted(variants: Iterable[Any]) -> bool:
    """Say whether Triton interprets one of these here, so that it cannot be compiled."""
    from triton.runtime.interpreter import InterpretedFunction

    return any(isinstance(variant.kernel, InterpretedFunction) for variant in variants)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON line, or the machine code, for every configuration and architecture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=kernel_names(), help="repeat for more; all by default")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="all by default")
    parser.add_argument("--variant", action="append", help="configurations of this name only; repeat for more")
    parser.add_argument("--listing", action="store_true", help="print the machine code instead of what it counts to")
    options = parser.parse_args(arguments)
    for name in options.kernel or kernel_names():
        chosen = [v for v in variants_of(name) if not options.variant or v.name in options.variant]
        if interpreted(chosen):
            sys.stderr.write("benchmarks.codegen: unset TRITON_INTERPRET, which keeps kernels from being compiled\n")
            return 2
        for arch in options.arch or ARCHITECTURES:
            if options.listing:
                print("\n".join(listings([build(variant, arch).asm["cubin"] for variant in chosen], arch)), flush=True)
            else:
                for row in compile_variants(name, chosen, arch):
                    print(json.dumps(asdict(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
