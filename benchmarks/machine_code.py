"""Compiled kernels as text (SASS) and as counts, read with the tools that Triton's wheel carries.

nvdisasm takes half a second to start, so many kernels go through it at once: as raw code, one behind the other.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

# bytes of an instruction, compute capability 7.0 and later; source: CUDA binary utilities
INSTRUCTION = 16
# what nvdisasm calls the architectures; "a": with the instructions that no other has, which Triton compiles for
CODES = {80: "SM80", 90: "SM90a", 100: "SM100a"}
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# the same with its place, its guard and its operands
STEP = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)[\w.]*\s*([^;]*)")
# what goes on where the listing does not say
ELSEWHERE = ("BRX", "BRXU", "JMP", "JMX", "JMXU", "RET")


def listings(cubins: Sequence[bytes], arch: int) -> list[str]:
    """Return the machine code of each kernel, an instruction a line.

    Args:
        cubins: compiled kernels, each an ELF file with one function.
        arch: 80, 90 or 100.
    Raises:
        ValueError: if nvdisasm names more or fewer instructions than there are.
    """
    codes = [function(cubin) for cubin in cubins]
    text = _tool("nvdisasm", b"".join(codes), "-b", CODES[arch])
    lines = [line for line in text.splitlines() if LINE.search(line)]
    sizes = [len(code) // INSTRUCTION for code in codes]
    if len(lines) != sum(sizes):
        raise ValueError(f"nvdisasm names {len(lines)} instructions of {sum(sizes)}")
    rest = iter(lines)
    return ["\n".join(islice(rest, size)) for size in sizes]


def function(cubin: bytes) -> bytes:
    """Return the code of the one function in a compiled kernel.

    Source: ELF-64, Figure 1-3 (file header) and 1-5 (section header).

    Raises:
        ValueError: if there are several, or none.
    """
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    strings = sections[names][4]
    found = [cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", strings + s[0])]
    if len(found) != 1:
        raise ValueError(f"a compiled kernel has one function; this one has {len(found)}")
    return found[0]


def resources(cubin: bytes) -> dict[str, int]:
    """Return what a kernel takes, by cuobjdump's names: REG and STACK of a thread, LOCAL (bytes spilled), and more."""
    text = _tool("cuobjdump", cubin, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def count(listing: str) -> tuple[Counter[str], Counter[str]]:
    """Return instructions by name, and global accesses by name and width, but for the padding at the end."""
    instructions: Counter[str] = Counter()
    accesses: Counter[str] = Counter()
    names = LINE.findall(listing)
    while names and (names[-1].startswith("NOP") or names[-1].startswith("BRA")):
        names.pop()
    for full in names:
        head = full.split(".")[0]
        instructions[head] += 1
        if head in ("LDG", "STG", "LDGSTS", "UBLKCP"):
            width = next((part for part in full.split(".") if part in ("64", "128", "U8", "S8", "U16", "S16")), "32")
            accesses[f"{head}.{width}"] += 1
    return instructions, accesses


def fewest(listing: str) -> int:
    """Return the fewest instructions on any way from a kernel's first to an EXIT: no warp issues fewer.

    A branch goes where it costs less and a call returns at once, so that what only unusual operands take, such as the
    exact quotient of a subnormal, is left out. A loop is passed once.

    Raises:
        ValueError: if no EXIT can be reached, or the listing does not say where a jump goes.
    """
    steps = {int(place, 16): rest for place, *rest in STEP.findall(listing)}
    reached, seen, issued = {min(steps, default=0)}, set(), 0
    while reached:
        issued += 1
        following: set[int] = set()
        for place in reached:
            if place not in steps:
                raise ValueError(f"a jump leads to {place:#x}, where the listing has no instruction")
            guard, name, operands = steps[place]
            if name == "EXIT":
                return issued
            if name in ELSEWHERE:
                raise ValueError(f"{name} {operands.strip()} at {place:#x} does not say where it goes")
            if name == "BRA":
                following.add(int(operands.split()[-1], 16))
            if name != "BRA" or guard or "," in operands:
                following.add(place + INSTRUCTION)
        seen |= reached
        reached = following - seen
    raise ValueError("no way leads to an EXIT")


def _tool(program: str, code: bytes, *options: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        run = subprocess.run([path, *options, file.name], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{program} failed: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout
