"""Sixteen picks among sixteen words, as LLVM's instructions that become few of the processor's.

Processors have an instruction that picks in every lane at once: vpermd of AVX-512 among sixteen words, that of AVX2
among eight. A compiler finds it for a pick written lane by lane in just so many lanes, and in no loop. With AVX2 two
picks and a choice between them make one of sixteen. Elsewhere a pick becomes a load for each lane.
"""

from typing import Any

from llvmlite import binding, ir

LANES = 16
# words that an instruction picks among
_FEATURES = binding.get_host_cpu_features()
AMONG = 8 if _FEATURES.get("avx2") and not _FEATURES.get("avx512f") else LANES
WORD = ir.IntType(32)


def pick(builder: Any, entries: Any, index: Any, among: int = AMONG) -> Any:
    """Return entries[index], lane by lane.

    Args:
        builder: of LLVM's instructions.
        entries: sixteen words.
        index: sixteen words below 16.
        among: words an instruction picks among, 8 or 16; no other result with one than with the other.
    """
    if among == LANES:
        return _permute(builder, entries, index)
    tables = _halves(builder, entries)
    halves = []
    for half in _halves(builder, index):
        inside = builder.and_(half, every(among - 1, among))
        low, high = (_permute(builder, table, inside) for table in tables)
        halves.append(builder.select(builder.icmp_unsigned(">=", half, every(among, among)), high, low))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(WORD, LANES), list(range(LANES))))


def _permute(builder: Any, entries: Any, index: Any) -> Any:
    """Return entries[index] for as many of one as of the other."""
    picked = ir.Constant(entries.type, ir.Undefined)
    for lane in (ir.Constant(WORD, i) for i in range(entries.type.count)):
        entry = builder.extract_element(entries, builder.extract_element(index, lane))
        picked = builder.insert_element(picked, entry, lane)
    return picked


def _halves(builder: Any, words: Any) -> list[Any]:
    """Return the first and the last eight of sixteen words."""
    lanes = ir.VectorType(WORD, LANES // 2)
    places = list(range(LANES))
    halves = places[: LANES // 2], places[LANES // 2 :]
    return [builder.shuffle_vector(words, words, ir.Constant(lanes, half)) for half in halves]


def every(value: int, lanes: int = LANES) -> Any:
    """Return the vector with this word in every lane."""
    return ir.Constant(ir.VectorType(WORD, lanes), [value] * lanes)
