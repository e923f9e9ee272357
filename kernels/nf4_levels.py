"""The levels of packed NF4 codes, inside a kernel: a word of eight codes to eight levels.

On a GPU every lane of a warp holds one level (the upper half all sixteen once more), and a code is the number of the
lane to fetch from: one shuffle a weight, no table in shared memory. Inline assembly says so; the interpreter, which
runs none, gathers from a table of sixteen. Both give the same bits.

Reference: lora_core/quant/packing.py
"""

import triton
import triton.language as tl

from lora_core.kernels.tile import INTERPRETED

# shuffles unless interpreted; a launch may ask for the table, to compare
SHUFFLED = not INTERPRETED.value

# $0: the level whose number is the lane's, modulo 16; $1: where the levels are
_LEVEL_OF_LANE = tl.constexpr("""{
.reg .u32 lane;
.reg .u64 place;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mul.wide.u32 place, lane, 4;
add.u64 place, place, $1;
ld.global.nc.f32 $0, [place];
}""")
# $0 to $7: levels of the word $8, in the order of the weights: the lowest byte first, its high half before its low one;
# $9: the lane's own level. 0x100f: lanes 0 to 15 and 16 to 31 each fetch among themselves, by the lowest four bits
_LEVELS_OF_WORD = tl.constexpr("""{
.reg .b32 code;
shr.u32 code, $8, 4;
shfl.sync.idx.b32 $0, $9, code, 0x100f, 0xffffffff;
shfl.sync.idx.b32 $1, $9, $8, 0x100f, 0xffffffff;
shr.u32 code, $8, 12;
shfl.sync.idx.b32 $2, $9, code, 0x100f, 0xffffffff;
shr.u32 code, $8, 8;
shfl.sync.idx.b32 $3, $9, code, 0x100f, 0xffffffff;
shr.u32 code, $8, 20;
shfl.sync.idx.b32 $4, $9, code, 0x100f, 0xffffffff;
shr.u32 code, $8, 16;
shfl.sync.idx.b32 $5, $9, code, 0x100f, 0xffffffff;
shr.u32 code, $8, 28;
shfl.sync.idx.b32 $6, $9, code, 0x100f, 0xffffffff;
shr.u32 code, $8, 24;
shfl.sync.idx.b32 $7, $9, code, 0x100f, 0xffffffff;
}""")


@triton.jit
def levels_of_words(word, levels_ptr, COUNT: tl.constexpr, SHUFFLED: tl.constexpr):
    """Levels, fp32 [COUNT, 8], of int32 words [COUNT] of eight codes each."""
    if SHUFFLED:
        start = tl.full((1,), 0, tl.int64) + levels_ptr.to(tl.int64)
        own = tl.inline_asm_elementwise(_LEVEL_OF_LANE, "=f,l", [start], dtype=tl.float32, is_pure=True, pack=1)
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
            _LEVELS_OF_WORD,
            "=f,=f,=f,=f,=f,=f,=f,=f,r,f",
            [word, tl.broadcast_to(own, (COUNT,))],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
        even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
        odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
        level = tl.join(even, odd).reshape(COUNT, 8)
    else:
        element = tl.arange(0, 8)
        shift = (element // 2) * 8 + (1 - element % 2) * 4
        code = (word[:, None] >> shift[None, :]) & 15
        table = tl.load(levels_ptr + tl.arange(0, 16))
        level = tl.gather(table, code.reshape(COUNT * 8), 0).reshape(COUNT, 8)
    return level
