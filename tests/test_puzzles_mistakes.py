"""Usual mistakes in an exercise are named, and what does the same otherwise is accepted."""

import pytest
import torch
from puzzled import edited, rewritten, said_of

from lora_core.puzzles.catalogue import find_puzzle
from lora_core.puzzles.compare import WrongAnswer, compare
from lora_core.puzzles.run import SOLVED, WRONG

# adapters padded to the largest rank, one at a time
PADDED = """\
        widest = max(len(other) for other in lora_a)
        a = torch.cat([a, a.new_zeros(widest - len(a), a.shape[1])])
        b = torch.nn.functional.pad(b, (0, widest - b.shape[1]))
        rows ="""


PADDED_B = """\
        wide = b.new_zeros(len(b), max(len(other) for other in lora_a))
        wide[:, : len(a)] = b
        b = wide[:, : len(a)]
        rows ="""


WORKSPACE = """\
    workspace = torch.zeros(max(len(a) for a in lora_a), x.shape[1])
    for g, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        workspace[: len(a)] = a
        workspace[len(a) :] = 0
        a = workspace
        b = torch.cat([b, b.new_zeros(len(b), len(a) - b.shape[1])], 1)
"""


WHOLE_LOOP = """\
    y = base.clone()
    for g, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        rows = torch.nonzero(which == g).flatten()
        y[rows] += s * (x[rows] @ a.T) @ b.T
    return y
"""


# all adapters side by side, none padded
TOGETHER = """\
    a, b, owner = x.new_zeros(sum(map(len, lora_a)), x.shape[1]), torch.cat(list(lora_b), 1), []
    for g, one in enumerate(lora_a):
        a[len(owner) : len(owner) + len(one)] = one
        owner += len(one) * [g]
    owner = torch.tensor(owner)
    return base + torch.where(which[:, None] == owner, x @ a.T * torch.tensor(scaling)[owner], 0) @ b.T
"""


# exercise, what stands in its solution, what a learner would write instead, what is said
MISTAKES = (
    (1, " + scaling * (x", " + (x", "forgot the scaling"),
    (1, "x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
     "scaling * (x @ weight.T + bias + (x @ lora_a.T) @ lora_b.T)", "scaled the frozen path too"),
    (1, " + bias", "", "forgot the bias"),
    (1, " + scaling * (x @ lora_a.T) @ lora_b.T", "", "the update is missing"),
    (1, "@ weight.T", "@ weight", "mat1 and mat2"),
    (1, "@ lora_b.T\n", "@ lora_b.T * 1.01\n", "elements are wrong; furthest off at"),
    (1, "@ lora_b.T\n", "@ lora_b.T + 0j\n", "is torch.complex64; want torch.float32"),
    (1, "return x", "x", "you returned a NoneType"),
    (1, "scaling * (x @ lora_a.T) @ lora_b.T", "scaling * x @ (lora_b @ lora_a).T", "right, but you formed B A"),
    (1, "scaling * (x @ lora_a.T) @ lora_b.T", "scaling * x @ __import__('torch').einsum('nr,rk->kn', lora_b, lora_a)",
     "right, but you formed B A"),
    (1, "x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
     "x @ weight.clone().addmm_(lora_b, lora_a, alpha=scaling).T + bias", "right, but you formed B A"),
    (1, "scaling * (x @ lora_a.T) @ lora_b.T",
     "scaling * __import__('torch').stack([x @ (b @ lora_a) for b in lora_b], 1)",
     "right, but you formed B A in pieces: 77 elements were computed from A and B alone, and B A has 7 x 11. That "
     "saves memory, but is all the work of the product: multiply x by A^T first"),
    (1, "x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
     "x @ weight.T + bias + sum(scaling * x[:, k : k + 1] * (lora_b @ lora_a[:, k]) for k in range(x.shape[1]))",
     "right, but you formed B A in pieces"),
    (1, "scaling * (x @ lora_a.T) @ lora_b.T",
     "scaling * __import__('torch').einsum('nr,rk,mk->mn', lora_b, lora_a, x)",
     "right, but torch.einsum('nr,rk,mk->mn', ...) formed inside what is as large as B A"),
    (2, "    return d_y @ weight + d_s @ lora_a,", "    low = sum(scaling * d_y[:, n : n + 1] * (b @ lora_a)"
     " for n, b in enumerate(lora_b))\n    return d_y @ weight + low,",
     "right, but you formed B A in pieces"),
    (2, "d_y @ weight + d_s @ lora_a,", "d_y @ (weight + scaling * lora_b @ lora_a),", "right, but you formed B A"),
    (2, "d_s.T @ x, scaling * d_y.T @ (x @ lora_a.T)",
     "scaling * lora_b.T @ (d_y.T @ x), scaling * (d_y.T @ x) @ lora_a.T", "you formed G^T x, the weight's gradient"),
    (2, "    return", "    x.detach().clone().requires_grad_().sum().backward()\n    return", "derive it by hand"),
    (2, "d_y @ weight + d_s @ lora_a,", "__import__('torch').func.vjp(lambda x: x @ weight.T"
     " + scaling * x @ lora_a.T @ lora_b.T, x)[1](d_y)[0],", "derive it by hand"),
    (2, "d_s = scaling * d_y", "d_s = d_y", "low-rank part of d_x lacks the scaling"),
    (2, " + d_s @ lora_a,", ",", "that of the frozen path alone"),
    (2, ", scaling * d_y.T", ", d_y.T", "d_lora_b lacks the scaling"),
    (2, ", scaling * d_y.T", ", scaling**2 * d_y.T", "d_lora_b has the scaling twice"),
    (2, "d_s.T @ x, scaling * d_y.T @ (x @ lora_a.T)", "d_s.T @ x", "want three gradients"),
    (3, "packed >> 4, packed & 15", "packed & 15, packed >> 4", "nibbles are swapped"),
    (3, "torch.stack([packed >> 4, packed & 15], dim=-1)", "torch.cat([packed >> 4, packed & 15])", "neighbours"),
    (3, "[:n]", "", "holds one and a filler"),
    (4, "blocks.abs().amax(1)", "blocks.amax(1)", "largest magnitude"),
    (4, "torch.bucketize(scaled, MIDPOINTS)", "(torch.bucketize(scaled, LEVELS, right=True) - 1)", "the level below"),
    (4, "MIDPOINTS)", "MIDPOINTS, right=True)", "half-way between two levels"),
    (4, "torch.where(absmax == 0, 1, absmax)", "absmax", "a block of zeros gets the code of zero"),
    (4, "(0, -n % block_size)", "(0, 0)", "invalid for input"),
    (4, ", absmax\n", "\n", "want (codes, absmax)"),
    (4, "torch.where(absmax == 0, 1, absmax)", "absmax.clamp(min=1e-3)", "weights of 2e-5"),
    (4, "torch.where(absmax == 0, 1, absmax)", "(absmax + 1e-8)", "elements are wrong"),
    (4, "blocks / torch.where(absmax == 0, 1, absmax)[:, None]",
     "blocks * (1 / torch.where(absmax == 0, 1, absmax))[:, None]", "you multiplied by 1 / absmax"),
    (4, "torch.bucketize(scaled, MIDPOINTS)", "(scaled.double()[..., None] - LEVELS.double()).abs().argmin(-1)",
     "count those below"),
    (5, " + offset", "", "forgot the mean"),
    (5, "absmax2.repeat_interleave(block_size)[: codes.numel()]",
     "absmax2.repeat(block_size)[: codes.numel()]", "not i % blocks"),
    (5, "levels[codes.long()] * absmax2.repeat_interleave(block_size)[: codes.numel()] + offset",
     "(levels.double()[codes.long()] * absmax2.repeat_interleave(block_size)[: codes.numel()] + offset).float()",
     "rounded once together"),
    (6, "factor * tl.load", "tl.load", "multiply by factor"),
    (6, "factor * tl.load", "3 * tl.load", "the factor is not always 3"),
    (7, "absmax_ptr + place // BLOCK_SIZE",
     "absmax_ptr + tl.program_id(0) * (BLOCK // BLOCK_SIZE) + tl.arange(0, BLOCK) // BLOCK_SIZE",
     "200 weights in blocks of 128"),
    (6, "other=0.0), mask=ok)", "other=0.0))", "mask the store as well"),
    (6, "tl.program_id(0) * BLOCK +", "", "does every program do its own part?"),
    (7, "byte >> 4, byte & 15", "byte & 15, byte >> 4", "nibbles are swapped"),
    (7, "place // BLOCK_SIZE", "place // 2 // BLOCK_SIZE", "counts weights"),
    (7, "tl.load(levels_ptr + code) * scale", "tl.load(levels_ptr + code)", "the scale is missing"),
    (7, ".to(tl.int32)", ".to(tl.nothing)", "line 12: byte = tl.load("),
    (8, "base + scaling * low", "base", "low-rank part is missing"),
    (8, "base + scaling * low", "base + low", "lacks the scaling"),
    (8, "base + scaling * low", "scaling * (base + low)", "belongs to the low-rank part alone"),
    (8, "base + scaling * low", "base + tl.cdiv(K, BLOCK_K) * scaling * low", "in every step over K"),
    (8, "mask=(row < M) & (r < R)[None, :], other=0.0", "mask=row < M, other=0.0", "mask the last tile of R in"),
    (8, "mask=(row < M) & (k < K)[None, :], other=0.0", "mask=row < M, other=0.0", "mask the last tile of K in"),
    (9, "part * ROWS + ", "", "part 1 of partial_kernel"),
    (9, "tl.store(out_ptr + place, factor * acc, mask=ok)", "tl.atomic_add(out_ptr + place, factor * acc, mask=ok)",
     "sum_kernel uses an atomic"),
    (9, "factor * acc", "acc", "the factor is missing"),
    (9, "mask=ok, other=0.0)\n    tl.store(out_ptr + place, factor * acc",
     "mask=ok, other=0.0) * factor\n    tl.store(out_ptr + place, acc", "multiply by the factor at the end"),
    (9, "range(PARTS)", "range(1)", "only the first part"),
    (9, "range(PARTS)", "range(PARTS - 1, -1, -1)", "to the bit of part 0 + part 1"),
    (9, "def sum_kernel", "def add_kernel", "has no sum_kernel"),
    (10, "tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n", "tl.arange(0, BLOCK_M)\n", "never written"),
    (10, "row.to(tl.uint32)", "tl.arange(0, BLOCK_M).to(tl.uint32)", "same mask"),
    (10, "x * factor", "x", "not divided by 1 - p"),
    (10, ">= threshold", "< threshold", "you keep what is to be dropped"),
    (11, "return (weight.square().sum(1) + mixed + update).clamp(min=0).sqrt()",
     "return (weight + scaling * lora_b @ lora_a).norm(dim=1)", "right, but you formed B A"),
    (11, "+ mixed + update).clamp(min=0).sqrt()", "+ mixed + update)", "take the root"),
    (11, "+ mixed + update", "+ update", "mixed term"),
    (11, "    mixed = ", "    scaling = 1.0\n    mixed = ", "forgot the scaling"),
    (11, "return (weight.square().sum(1) + mixed + update).clamp(min=0).sqrt()",
     "return (weight + scaling * lora_b @ lora_a).norm(dim=0)", "norms of the columns"),
    (11, "(lora_b * (weight @ lora_a.T)).sum(1)",
     "(weight * (lora_b[:, :, None] * lora_a).sum(1)).sum(1)", "right, but you formed B A"),
    (11, "(lora_b * (weight @ lora_a.T)).sum(1)",
     "__import__('torch').einsum('nr,rk,nk->n', lora_b, lora_a, weight)",
     "right, but torch.einsum('nr,rk,nk->n', ...) formed inside what is as large as B A, 7 x 11: it multiplies its "
     "operands two at a time, beginning with the first two. Write one product of two operands after another: W A^T"),
    (12, "    for g, (a,", "    widest = max(len(a) for a in lora_a)\n"
     "    lora_a = [torch.cat([a, a.new_zeros(widest - len(a), a.shape[1])]) for a in lora_a]\n"
     "    lora_a = torch.stack(lora_a)\n"
     "    lora_b = [torch.cat([b, b.new_zeros(len(b), widest - b.shape[1])], 1) for b in lora_b]\n    for g, (a,",
     "none is to be padded"),
    (12, "        rows =", PADDED, "33 elements from A of adapter 0, whose A has 22: none is to be padded"),
    (12, "        rows =", PADDED_B, "18 elements from B of adapter 0, whose B has 12: none is to be padded"),
    (12, "    for g, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):\n", WORKSPACE,
     "33 elements from A of adapter 0, whose A has 22: none is to be padded"),
    (12, "(x[rows] @ a.T) @ b.T", "x[rows] @ (b @ a).T", "right, but you formed B A, a matrix of 6 x 11"),
    (12, "torch.nonzero(which == g)", "torch.nonzero(which % len(lora_a) == g)", "-1 is no adapter"),
    (12, "base.clone()", "torch.zeros_like(base)", "output is missing"),
    (12, "base.clone()", "base", "you changed base in place"),
    (13, "(element ^ 1)", "element", "nibbles are swapped"),
    (13, "(element ^ 1)", "(7 - (element ^ 1))", "backwards"),
    (13, "tl.gather(table, code.reshape(8 * WORDS), 0).reshape(WORDS, 8)", "tl.load(levels_ptr + code)",
     "instructions a weight on sm_90; the budget is 7"),
    (13, "WARPS = 4", "WARPS = 'four'", "WARPS, its warps: whole numbers"),
    (13, "round_to(level * scale[:, None], tl.bfloat16)", "(level * scale[:, None]).to(tl.bfloat16)",
     "round_to rounds"),
)  # fmt: skip


# loads beyond an operand's end of what is not used
NEEDLESS = (
    (6, "x_ptr + place, mask=ok, other=0.0", "x_ptr + place"),
    (7, "absmax_ptr + place // BLOCK_SIZE, mask=ok, other=0.0", "absmax_ptr + place // BLOCK_SIZE"),
    (10, "x_ptr + place, mask=ok, other=0.0", "x_ptr + place"),
    (13, "absmax_ptr + word // (BLOCK_SIZE // 8), mask=ok, other=0.0", "absmax_ptr + word // (BLOCK_SIZE // 8)"),
)


# exercise, what is written in its kernel for what, what is said; all is right while the block sizes are alike
BLOCK_MISTAKES = (
    (6, {"* BLOCK + tl.arange(0, BLOCK)": "* 16 + tl.arange(0, 16)"},
     "With BLOCK 16 it is right: is a number written where BLOCK is meant? It is for the elements of a program"),
    (6, {"* BLOCK + tl.arange(0, BLOCK)": "* 1024 + tl.arange(0, 1024)"}, "is a number written where BLOCK is meant?"),
    (7, {"* BLOCK + tl.arange(0, BLOCK)": "* 64 + tl.arange(0, 64)"},
     "With BLOCK 64 it is right: is a number written where BLOCK is meant? It is for the weights of a program"),
    (8, {"tl.program_id(0) * BLOCK_M": "tl.program_id(0) * BLOCK_N",
         "tl.program_id(1) * BLOCK_N": "tl.program_id(1) * BLOCK_M"},
     "With all block sizes 16 it is right: BLOCK_M and BLOCK_N are probably mixed up. BLOCK_M is for the rows of y"),
    (8, {"BLOCK_M": "BLOCK_N", "BLOCK_N": "BLOCK_M", "BLOCK_K": "BLOCK_R", "BLOCK_R": "BLOCK_K"},
     "BLOCK_M and BLOCK_N are probably mixed up"),
    (8, {"range(0, K, BLOCK_K)": "range(0, K, BLOCK_R)"}, "BLOCK_K and BLOCK_R are probably mixed up"),
    (8, {"range(0, R, BLOCK_R)": "range(0, R, BLOCK_K)"}, "BLOCK_K and BLOCK_R are probably mixed up"),
    (8, {"k = start + tl.arange(0, BLOCK_K)": "k = start + tl.arange(0, BLOCK_M)"},
     "BLOCK_M and BLOCK_K are probably mixed up"),
    (8, {"range(0, K, BLOCK_K)": "range(0, K, 16)"}, "is a number written where BLOCK_K is meant?"),
    (9, {"part * ROWS": "part * BLOCK_R", "tl.program_id(0) * BLOCK_N": "tl.program_id(0) * ROWS"},
     "block sizes are probably mixed up, ROWS among them. They are ROWS for the rows of a part"),
    (9, {"part * ROWS": "part * BLOCK_R"}, "ROWS and BLOCK_R are probably mixed up"),
    (9, {"rank = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_R)":
         "rank = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)"},
     "BLOCK_R and BLOCK_N are probably mixed up"),
    (9, {"* BLOCK + tl.arange(0, BLOCK)": "* 32 + tl.arange(0, 32)", "(BLOCK,)": "(32,)"},
     "is a number written where BLOCK is meant? It is for the elements of a program of sum_kernel"),
)  # fmt: skip


# steps of another length give the right result: the interpreter sees the loads
STEP_MISTAKES = (
    ({"BLOCK_K": "BLOCK_R", "BLOCK_R": "BLOCK_K"},
     "right, but x is loaded 256 elements at a time; want tiles of BLOCK_M x BLOCK_K, 1024\n"
     "  With all block sizes 16 it is right: BLOCK_K and BLOCK_R are probably mixed up"),
    ({"BLOCK_R": "16"}, "is a number written where BLOCK_R is meant? It is for the steps of the low-rank product"),
    ({"BLOCK_K": "32"}, "right, but x is loaded 512 elements at a time; want tiles of BLOCK_M x BLOCK_K, 256"),
)  # fmt: skip


# exercise, what stands in its solution, what does the same otherwise
OTHERWISE = (
    (1, "x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
     "x @ weight.T + bias + scaling * sum((x @ a)[:, None] * b for a, b in zip(lora_a, lora_b.T, strict=True))"),
    (1, "x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
     "__import__('torch').stack([v @ weight.T + bias + lora_b @ (scaling * lora_a @ v) for v in x])"),
    (1, "(x @ lora_a.T) @ lora_b.T", "__import__('torch').einsum('mk,rk,nr->mn', x, lora_a, lora_b)"),
    (11, "(lora_b * (weight @ lora_a.T)).sum(1)",
     "__import__('torch').einsum('nk,rk,nr->n', weight, lora_a, lora_b)"),
    (12, "(x[rows] @ a.T) @ b.T", "(x[rows] @ a.T.contiguous()) @ (1.0 * b).T"),
    (12, WHOLE_LOOP, TOGETHER),
)  # fmt: skip


@pytest.mark.parametrize(("number", "old", "new", "says"), MISTAKES)
def test_puzzles_usual_mistake_is_named(number, old, new, says, tmp_path, capsys):
    puzzle = find_puzzle(number)
    status, said = said_of(puzzle, edited(puzzle, old, new, tmp_path), capsys)
    assert status == WRONG and says in said, said


@pytest.mark.parametrize(("number", "changes", "says"), BLOCK_MISTAKES)
def test_puzzles_block_size_in_another_ones_place_is_named(number, changes, says, tmp_path, capsys):
    puzzle = find_puzzle(number)
    status, said = said_of(puzzle, rewritten(puzzle, changes, tmp_path), capsys)
    assert status == WRONG and says in said, said


@pytest.mark.interpreted
@pytest.mark.parametrize(("changes", "says"), STEP_MISTAKES)
def test_puzzles_steps_of_another_ones_length_are_named(changes, says, tmp_path, capsys):
    puzzle = find_puzzle(8)
    status, said = said_of(puzzle, rewritten(puzzle, changes, tmp_path), capsys)
    assert status == WRONG and says in said, said


@pytest.mark.parametrize(("number", "old", "new"), OTHERWISE)
def test_puzzles_other_right_solution_is_accepted(number, old, new, tmp_path, capsys):
    puzzle = find_puzzle(number)
    status, said = said_of(puzzle, edited(puzzle, old, new, tmp_path), capsys)
    assert status == SOLVED, said


@pytest.mark.interpreted
@pytest.mark.parametrize(("number", "old", "new"), NEEDLESS)
def test_puzzles_needless_read_beyond_the_end_is_named(number, old, new, tmp_path, capsys):
    """On a GPU nobody sees what is loaded and not used."""
    puzzle = find_puzzle(number)
    status, said = said_of(puzzle, edited(puzzle, old, new, tmp_path), capsys)
    assert status == WRONG and "right, but your kernel reads beyond the end of an operand" in said, said


def test_puzzles_mistake_that_rounds_further_than_the_right_result_is_named():
    """By hand: the right row is exact, the mistake's is a sum of about 9, an ulp off in another order."""
    want, guess = torch.tensor([0.5, 3.0]), torch.tensor([9.0, 3.0])
    got = guess.nextafter(torch.tensor(torch.inf))
    room = torch.tensor([2.0**-126, 2.0**-20], dtype=torch.float64)
    with pytest.raises(WrongAnswer, match="the usual one"):
        compare(got, want, room, "given", ((guess, "the usual one"),))
    with pytest.raises(WrongAnswer, match="1 of 2 elements are wrong"):
        compare(got + torch.tensor([2.0**-10, 0.0]), want, room, "given", ((guess, "the usual one"),))
    with pytest.raises(WrongAnswer, match="2 of 2 elements are wrong"):
        compare(got, want, 0, "given", ((guess, "the usual one"),))
