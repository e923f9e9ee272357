"""Plant errors and expect the tests to see them: `python tests/mutation.py`, or `--sample` for every fourth.

Each mutation is one small change to a kernel, a reference or a layer, and the test that must turn red. The tests run on
a copy of the sources; first all of them unchanged, as a test that is red anyway proves nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lora_core", "kernels", "quant", "tests", "benchmarks", "pyproject.toml")
SAMPLED = 4
WORKERS = 2


@dataclass(frozen=True)
class Mutation:
    """One planted error.

    Args:
        file: path from the root.
        old: text that the file holds once.
        new: what it becomes.
        test: file and name of a test, as pytest selects them with -k.
    """

    file: str
    old: str
    new: str
    test: str


TILE, DEQUANTIZE, QUANTIZE = "kernels/tile.py", "kernels/nf4_dequantize.py", "kernels/nf4_quantize.py"
SHRINK, PRODUCT, ROWS, SUM = (f"kernels/{name}.py" for name in ("shrink", "low_rank_matmul", "row_sum", "split_sum"))
LINEAR, PACKED, PANELS, COLUMNS, NF4, DECODE = (
    f"kernels/{name}.py"
    for name in ("lora_linear", "nf4_lora_linear", "nf4_panels", "nf4_columns", "nf4_matmul", "nf4_tile")
)
LOW_RANK, LEVELS, EAGER = "kernels/low_rank.py", "kernels/nf4_levels.py", "lora_core/ops/eager.py"
DORA, GROUPED, FUSED = "kernels/dora_norm.py", "kernels/grouped_lora.py", "lora_core/layers/fused_peft.py"
LINEARS, SIBLINGS = "kernels/lora_linears.py", "lora_core/layers/siblings.py"
CPU_GROUPED, CHECKS = "lora_core/cpu/grouped_lora.py", "lora_core/ops/checks.py"
CPU, CPU_PRODUCT = "lora_core/cpu/low_rank.py", "lora_core/cpu/product.py"
COMPILED, PLAIN = "lora_core/cpu/compiled/nf4.py", "lora_core/cpu/plain/nf4.py"
COMPILED_PRODUCT, COMPILED_TILE, COMPILED_PICKED, COMPILED_SPREAD, SIXTEEN, SHARED = (
    f"lora_core/cpu/compiled/{name}.py" for name in ("nf4_product", "tile", "picked", "spread", "sixteen", "share")
)
REACH, CROSSOVER = "kernels/reach.py", "kernels/crossover.py"
GROUPS, EXPAND = "kernels/groups.py", "kernels/gather_expand.py"
CPU_NORM, CPU_ROTARY, CPU_GATE, FLOATS, CPU_ATTENTION, PANEL = (
    f"lora_core/cpu/compiled/{name}.py"
    for name in ("rms_norm", "rotary", "swiglu", "floats", "causal_attention", "panel")
)
BETWEEN, RECOGNISED = "lora_core/layers/blocks.py", "lora_core/adapt/blocks.py"
ATTENDING = "lora_core/layers/block_attention.py"
NORM, ROTARY, GATE = "kernels/rms_norm.py", "kernels/rotary.py", "kernels/swiglu.py"

IN_DEQUANTIZE = "test_kernels_nf4_dequantize.py::test_nf4_dequantize_kernel_gives_the_references_bits"
IN_ROUNDING = "test_kernels_nf4_dequantize.py::test_nf4_dequantize_kernel_rounds_ties"
IN_QUANTIZE = "test_kernels_quantize.py::test_nf4_quantize_kernel_gives_the_references_codes"
AT_THRESHOLDS = "test_kernels_quantize.py::test_nf4_quantize_kernel_decides_at_the_thresholds"
IN_ABSMAX = "test_kernels_quantize.py::test_absmax_kernels_give"
IN_LINEAR = "test_kernels_lora_linear.py::test_lora_linear_kernels_match_the_formula"
IN_BACKWARD = "test_kernels_lora_linear.py::test_lora_linear_backward_kernels_match_the_formula"
IN_TILES = "test_kernels_lora_linear.py::test_low_rank_matmul_kernel_walks_every_tile"
IN_MASK = "test_kernels_lora_linear.py::test_dropout_in_the_kernels_is_the_references_mask"
IN_TOTAL = "test_kernels_lora_linear.py::test_a_product_can_be_added_to_a_total"
IN_SHRINK = "test_kernels_lora_linear.py::test_shrink_kernel_splits"
IN_ROWS = "test_kernels_lora_linear.py::test_row_sum_kernel_splits"
IN_PARTS = "test_kernels_lora_linear.py::test_row_sum_kernel_adds_the_gradient"
IN_SUM = "test_kernels_lora_linear.py::test_split_sum_kernel_adds_in_order"
ANY_STRIDES = "test_kernels_lora_linear.py::test_lora_linear_kernels_take_any_strides"
LYING_APART = "test_kernels_lora_linear.py::test_an_a_whose_rows_lie_apart"
WIDE_LOADS = "test_kernels_lora_linear.py::test_operands_of_single_elements"
GROUPED_STRIDES = "test_kernels_grouped_lora.py::test_grouped_lora_kernels_take_any_strides"
IN_NF4 = "test_kernels_nf4_lora_linear.py::test_nf4_lora_linear_kernels_match_the_formula"
IN_NF4_BACKWARD = "test_kernels_nf4_lora_linear.py::test_nf4_lora_linear_backward_kernels_match"
IN_NF4_READING = "test_kernels_nf4_lora_linear.py::test_nf4_matmul_kernel_reads_every_element"
IN_MANY_ADAPTERS = "test_kernels_grouped_lora.py::test_grouped_lora_kernels_find"
IN_NF4_NESTED = "test_kernels_nf4_lora_linear.py::test_nf4_lora_linear_kernels_take_any_second_level"
IN_REACH = "test_kernels_far.py::test_operands_of_more_dimensions"
IN_WIDE = "test_kernels_far.py::test_float64_is_left"
IN_HALVES = "test_kernels_far.py::test_half_precision_is_left"
IN_ALIGNED = "test_kernels_nf4_lora_linear.py::test_panels_of_rows_that_fill"
IN_DIFFERENTIATED = "test_ops_eager.py::test_a_gradient_that_is_to_be_differentiated"
IN_SECOND = "test_ops_functional.py::test_second_derivatives"
IN_BUILT = "test_kernels_dispatch.py::test_operations_run_by_the_reference"
IN_NF4_SPLIT = "test_kernels_nf4_lora_linear.py::test_nf4_matmul_kernel_splits"
IN_PANELS = "test_kernels_nf4_lora_linear.py::test_panels_of_rows_put_together"
IN_COLUMNS = "test_kernels_nf4_lora_linear.py::test_panels_of_columns_put_together"
IN_NF4_COLUMNS = "test_kernels_nf4_lora_linear.py::test_nf4_backward_kernels_in_panels_of_columns_match"
IN_NF4_ADDED = "test_kernels_nf4_lora_linear.py::test_nf4_input_gradient_is_added"
IN_DORA = "test_kernels_dora_norm.py::test_dora_norm_kernel_matches"
IN_NF4_DORA = "test_kernels_dora_norm.py::test_nf4_dora_norm_kernel_matches"
IN_ATTENTION = "test_cpu_causal_attention.py::test_is_within"
IN_PANEL, IN_PANELS_OF = (f"test_cpu_panel.py::{name}" for name in ("test_panel_is", "test_products_of"))
IN_NORM = "test_kernels_rms_norm.py::test_rms_norm_kernels_match"
IN_ROTARY = "test_kernels_rotary.py::test_rotary_kernel_matches"
IN_GATE = "test_kernels_swiglu.py::test_swiglu_kernels_match"
IN_GROUPED = "test_kernels_grouped_lora.py::test_grouped_lora_kernels_match"
IN_GROUPED_TILES = "test_kernels_grouped_lora.py::test_grouped_lora_kernels_walk_every_tile"
IN_GROUPED_BACKWARD = "test_kernels_grouped_lora.py::test_grouped_lora_backward_kernels_match"
IN_SORTING = "test_kernels_grouped_lora.py::test_grouped_lora_sorts"
IN_LINEARS = "test_kernels_lora_linears.py::test_lora_linears_kernels_match"
IN_LINEARS_BACKWARD = "test_kernels_lora_linears.py::test_lora_linears_backward_kernels_match"
IN_SIBLINGS_COMPUTE = "test_ops_lora_linears.py::test_lora_linears_match_the_formula"
IN_CHANGED = "test_adapt_siblings_changed.py::test_a_change_before_a_layer"
IN_UNUSED = "test_ops_lora_linears.py::test_a_layer_whose_output_is_not_used"
IN_SIBLINGS = "test_adapt_siblings.py::test_an_output_belongs"
IN_DRAWN = "test_adapt_siblings.py::test_siblings_with_dropout_draw_their_masks"
IN_HOOKED = "test_adapt_siblings.py::test_a_hook_before_a_sibling"
IN_BRANCH = "test_adapt_bypassed.py::test_the_branch_that_a_module_takes"
IN_TRAINING = "test_adapt_bypassed.py::test_what_may_not_be_called_in_training"
IN_SHARE = "test_adapt_wrapped.py::test_a_share_of_an_adapter_is_not"
IN_WRAPPED = "test_adapt_wrapped.py::test_an_adapter_is_saved_by_the_names"
IN_MERGED = "test_adapt_merge.py::test_a_backward_while_merged_is_refused"
IN_HELD = "test_layers_siblings.py::test_a_sibling_called_under_other_conditions"
IN_PLACE = "test_ops_eager.py::test_a_result_may_be_changed_in_place"
IN_NONE = "test_ops_lora_linear.py::test_lora_linear_passes_opcheck"
IN_AUTOCAST = "test_ops_modes.py::test_backward_inside_autocast"
IN_STOPPED = "test_adapt_stopped.py::"
IN_OVERLAPPING = "test_adapt_stopped.py::test_blocks_that_overlap"
IN_TRANSFORM = "test_ops_functional.py::test_transform_of_an_operation"
IN_PUT_BACK = "test_adapt_checkpoint_killed.py::test_checkpoint_whose_second_rename"
IN_BATCH = "test_ops_modes.py::test_gradients_may_come_in_a_batch"
IN_BYPASSED = "test_adapt_bypassed.py::test_what_is_never_called_is_read"
IN_CPU_ROWS = "test_cpu_product.py::test_gradient_of_b"
IN_PANELS_OF_ROWS = "test_kernels_nf4_lora_linear.py::test_every_panel_of_rows_has"
IN_ONE_ROW = "test_kernels_far.py::test_a_matrix_of_one_row"
IN_SIDES = "test_kernels_crossover.py::test_faster_path_tells"
IN_WINDOWS = "test_demo_corpus.py::test_demo_nats_per_byte_of_some_windows"
IN_SAMPLE = "test_demo_parts.py::test_demo_sample_goes_on"
IN_SCALED_PRODUCT = "test_cpu_product.py::test_scaled_product_is"
IN_CPU_DECODE = "test_cpu_nf4.py::test_cpu_dequantises_to_the_bits_of_the_reference"
IN_CPU_SCALES = "test_cpu_nf4.py::test_cpu_decodes_every_byte_at_strange_scales"
IN_CPU_SCALES_ALONE = "test_cpu_nf4.py::test_cpu_decodes_scales_to_the_bits"
IN_CPU_CHUNKS = "test_cpu_nf4.py::test_cpu_gives_the_references_bits_on_many_chunks"
IN_SHARED = "test_cpu_share.py::test_every_range"
IN_COUNTED = "test_cpu_share.py::test_arrays_are"
IN_FAILED = "test_cpu_share.py::test_failure"
IN_CPU_PICK = "test_cpu_pick.py::test_pick_takes_the_entry_that_each_lane_names"
IN_FEW_ROWS = "test_cpu_few_rows.py::test_few_rows_match_the_formula"
IN_FEW_ROWS_BACK = "test_cpu_few_rows.py::test_few_rows_match_the_formula_backward"
IN_INFINITE_ROW = "test_cpu_few_rows.py::test_few_rows_backward_keep_an_infinite_last_row"
IN_TILE = "test_cpu_tile.py::test_tile_is_the_product"
IN_STREAMED = "test_cpu_stream.py::test_large_results"
IN_CPU_ENCODE = "test_cpu_nf4.py::test_cpu_quantises"
IN_CPU_GROUPED = "test_cpu_grouped_lora.py::test_cpu_mixed_batch_keeps_an_infinite"
IN_CPU_GROUPED_BACKWARD = "test_cpu_grouped_lora.py::test_cpu_mixed_batch_gradients"
IN_PRODUCT = "test_cpu_product.py::test_product_is_the_formula"
IN_ADD_PRODUCT = "test_cpu_product.py::test_add_product_is"
IN_OTHER_LLAMAS = "test_adapt_blocks_recognised.py::test_a_llama_that_computes"
OF_ATTENTION, OF_ATTENDING = "test_adapt_blocks_attention.py", "test_adapt_blocks_attends.py"
IN_FUSE = "test_adapt_fuse.py::test_fused_layers_compute_the_formula"

MUTATIONS = (
    Mutation(TILE, "bits + 0x7FFF +", "bits + 0x8000 +", IN_ROUNDING),
    Mutation(TILE, "h *= 0x7FEB352D", "h *= 0x7FEB352F", IN_MASK),
    Mutation(TILE, "row_hash[:, None] ^ column", "row_hash[:, None] + column", IN_MASK),
    Mutation(TILE, "below = x < tl", "below = x <= tl", AT_THRESHOLDS),
    Mutation(TILE, "    acc *= factor\n    if threshold", "    if threshold", IN_LINEAR),
    Mutation(DEQUANTIZE, "absmax2 + tl.load(nested_offset_ptr)", "absmax2", IN_DEQUANTIZE),
    Mutation(LEVELS, "(1 - element % 2) * 4", "(element % 2) * 4", IN_DEQUANTIZE),
    Mutation(
        DEQUANTIZE,
        "first_block // NESTED_BLOCK",
        "first_block // (2 * NESTED_BLOCK)",
        "test_kernels_nf4_dequantize.py::test_nf4_dequantize_kernel_takes_any_second_level_block",
    ),
    Mutation(QUANTIZE, "tl.where(absmax == 0.0, 1.0, absmax)", "absmax", IN_QUANTIZE),
    Mutation(QUANTIZE, "(1 - element % 2) * 4", "(element % 2) * 4", IN_QUANTIZE),
    Mutation(
        QUANTIZE,
        "tl.div_rn(w, tl.broadcast_to(share[:, None], (units, PER_UNIT)))",
        "w * (1.0 / share)[:, None]",
        AT_THRESHOLDS,
    ),
    Mutation("kernels/absmax_quantize.py", "other=0.0) - offset", "other=0.0)", IN_ABSMAX),
    Mutation(
        "kernels/absmax_quantize.py",
        "tl.where(ok, tl.load(absmax_ptr + place, mask=ok, other=0.0) - offset, 0.0)",
        "tl.load(absmax_ptr + place, mask=ok, other=0.0) - offset",
        IN_ABSMAX,
    ),
    Mutation("kernels/absmax_quantize.py", "tl.where(absmax2 == 0.0, 1.0, absmax2)", "absmax2", IN_ABSMAX),
    Mutation("kernels/absmax_dequantize.py", "place // block_size", "place // (block_size + 1)", IN_ABSMAX),
    Mutation(
        DECODE, "None and w.nested_block_size != NESTED", "None and w.nested_block_size < 0 * NESTED", IN_NF4_NESTED
    ),
    Mutation(REACH, "any(map(_is_far, args))", "False", IN_REACH),
    Mutation(REACH, "any(t.dtype == torch.float64 for t in (tokens, *matrices))", "False", IN_WIDE),
    Mutation(REACH, "and not _multiplies_halves(tokens.device)", "and False", IN_HALVES),
    Mutation(PANELS, "for rows in (aligned, whole)", "for rows in (whole,)", IN_ALIGNED),
    Mutation(PANELS, "    w = as_read(w)\n    n, k = w.shape\n    step", "    n, k = w.shape\n    step", IN_NF4_NESTED),
    Mutation(SUM, "    total *= factor\n", "", IN_SUM),
    Mutation(SUM, "out.numel() % ALIGNMENT or", "out.numel() % 2 or", IN_SUM),
    Mutation(
        SUM,
        "_ODD = form(_split_sum_kernel)",
        '_ODD = form(_split_sum_kernel, aligned=("size",))',
        "test_kernels_compiled.py::test_kernels_are_compiled_a_few_times_for_all_numbers_of_tokens",
    ),
    Mutation(SUM, "in range(parts)", "in range(parts - 1)", IN_SUM),
    Mutation(SHRINK, "factor = factor / (1 - dropout)", "factor = factor * 1.0", IN_SHRINK),
    Mutation(SHRINK, "first = split * k_per_split", "first = split * (k_per_split - 1)", IN_SHRINK),
    Mutation(SHRINK, "launch_split_sum(s, low, factor)", "launch_split_sum(s, low)", IN_SHRINK),
    Mutation(PRODUCT, "column < N * has_bias", "column < (N - 1) * has_bias", IN_LINEAR),
    Mutation("kernels/form.py", "(t.shape[unit] | t.stride", "(t.stride", WIDE_LOADS),
    Mutation(SHRINK, "if not in_wide_loads(x):", "if x.stride(1) != 1:", IN_SHRINK),
    Mutation(PRODUCT, " and (unit == 1 or lora_b.stride(1) % ALIGNMENT == 0)", "", LYING_APART),
    Mutation(NF4, "reading(w, SMALL_TILE[1]) if wide else ELEMENTS", "reading(w, SMALL_TILE[1])", IN_NF4),
    Mutation(PRODUCT, "inside % rows_of_group)", "inside % GROUP)", IN_TILES),
    Mutation(PRODUCT, "    if ACCUMULATE:", "    if ACCUMULATE and BLOCK_M < 64:", IN_TOTAL),
    Mutation(PRODUCT, "k_ok = k + step < K", "k_ok = k + step < K - 1", IN_LINEAR),
    Mutation(ROWS, "t = t.contiguous()", "t = t + 0", ANY_STRIDES),
    Mutation(GROUPED, "scaling.contiguous(), hidden.contiguous()", "scaling.contiguous(), hidden", GROUPED_STRIDES),
    Mutation(ROWS, "(tile * M + row)[:, None]", "(tile * 0 + row)[:, None]", IN_PARTS),
    Mutation(ROWS, "        if DROPOUT:", "        if DROPOUT and BLOCK_M < 32:", IN_ROWS),
    Mutation(ROWS, "split * C * R +", "split * C * 0 +", IN_ROWS),
    Mutation(LOW_RANK, "hidden, scaling, shrink_by", "hidden, 1.0, shrink_by", IN_BACKWARD),
    Mutation(LINEAR, "lora_a.T, 1 / (1 - dropout), dropout", "lora_a.T, 1.0, dropout", IN_BACKWARD),
    Mutation(NF4, "    if split == 0:", "    if split >= 0:", IN_NF4_SPLIT),
    Mutation(NF4, "round_to(w, x_ptr.dtype.element_ty)", "(w * 1.01).to(x_ptr.dtype.element_ty)", IN_NF4),
    Mutation(DECODE, "byte >> 4, byte & 15", "byte & 15, byte >> 4", IN_NF4_READING),
    Mutation(DECODE, "* PER_SCALE >> block_shift", "* 4 >> block_shift", IN_NF4_READING),
    Mutation(PANELS, "absmax=w.absmax.reshape(-1)[block:last]", "absmax=w.absmax[: last - block]", IN_PANELS),
    Mutation(PACKED, "up = (d_s, lora_a.T, 1 / (1 - dropout)", "up = (d_s, lora_a.T, 1 + dropout", IN_NF4_BACKWARD),
    Mutation(NORM, "squares / K + eps", "squares / BLOCK_K + eps", IN_NORM),
    Mutation(NORM, "(product / K)[:, None]", "product[:, None]", IN_NORM),
    Mutation(NORM, "d_weight += g * n", "d_weight += h * n", IN_NORM),
    Mutation(
        NORM, "part.view(PARTS,", "part[:PARTS].view(PARTS,", "test_kernels_rms_norm.py::test_rms_norm_kernel_adds"
    ),
    Mutation(ROTARY, "x1 * c1 + x2 * s2, x2 * c2 - x1 * s1", "x1 * c1 + x2 * s1, x2 * c2 - x1 * s2", IN_ROTARY),
    Mutation(ROTARY, "cos_ptr + b * stride_cb + t", "cos_ptr + t", IN_ROTARY),
    Mutation(GATE, "gate * (1.0 - sigma)", "gate * sigma", IN_GATE),
    Mutation(GATE, "t if t.stride(1) == 1 else t.contiguous()", "t", IN_GATE),
    Mutation(DORA, "part = 2.0 * scaling", "part = scaling", IN_DORA),
    Mutation(DORA, "tl.program_id(1) == 0, squares", "tl.program_id(1) >= 0, squares", IN_DORA),
    Mutation(DORA, "round_to(w, w_ptr.dtype.element_ty)", "w * 1.01", IN_NF4_DORA),
    Mutation(GROUPS, "(adapter < 0) | (adapter >= count)", "(adapter < 0)", IN_SORTING),
    Mutation(GROUPS, "tl.range(0, G, SEARCHED", "tl.range(0, tl.minimum(G, 1), SEARCHED", IN_MANY_ADAPTERS),
    Mutation(GROUPS, "of_group * rank_widths(tuple(ranks), adapter.device)", "of_group", IN_SORTING),
    Mutation(GROUPS, "group) + of_group * ranks", "group) + of_group", IN_GROUPED),
    Mutation(
        "kernels/gather_gradient.py",
        "    t_ptr += begin_of_group(",
        "    t_ptr += 0 * begin_of_group(",
        IN_GROUPED_BACKWARD,
    ),
    Mutation(ROWS, "else dot(tl.trans(t), d, product)", "else dot(tl.trans(t), d, 0 * product)", IN_BACKWARD),
    Mutation(SHRINK, "tl.program_id(0).to(tl.int64) * BLOCK_M", "tl.program_id(0).to(tl.int64) * 16", IN_LINEAR),
    Mutation(GROUPS, "(tile - tiles_before) * BLOCK_M", "(tile - tiles_before) * (BLOCK_M + 1)", IN_GROUPED_TILES),
    Mutation(
        EXPAND, "s_ptr + stored[:, None] + rank[None, :]", "s_ptr + stored[:, None] + rank[None, :] * 0", IN_GROUPED
    ),
    Mutation(
        GROUPED,
        "launch_gather_gradient(hidden, d_y, found, ranks, scaling,",
        "launch_gather_gradient(hidden, d_y, found, ranks, None,",
        IN_GROUPED_BACKWARD,
    ),
    Mutation(
        "lora_core/reference/dora.py",
        "+ 2 * scaling * (b",
        "+ scaling * (b",
        "test_kernels_dora_norm.py::test_dora_norm_by_algebra",
    ),
    Mutation(
        LOW_RANK,
        "if need_bias and d_bias is None:",
        "if need_bias and need_b:",
        "test_kernels_lora_linear.py::test_lora_linear_backward_kernels_make_just",
    ),
    Mutation(
        PACKED,
        "    if need_x and d_s is not None:",
        "    if d_s is not None:",
        "test_kernels_nf4_lora_linear.py::test_nf4_lora_linear_backward_kernels_make_just",
    ),
    Mutation(
        GROUPED,
        "    if need_b:\n",
        "    if need_a:\n",
        "test_kernels_grouped_lora.py::test_grouped_lora_backward_kernels_make_just",
    ),
    Mutation(
        PRODUCT,
        "bias.contiguous(),",
        "bias,",
        "test_kernels_lora_linear.py::test_lora_linear_kernels_take_any_strides",
    ),
    Mutation(
        DEQUANTIZE,
        "n % 32 == 0 and begins_aligned(codes, absmax, nested_absmax)",
        "n % 32 == 0",
        "test_kernels_nf4_dequantize.py::test_nf4_dequantize_kernel_takes_words_and_bytes",
    ),
    Mutation(DEQUANTIZE, "n % 32 == 0 and", "n % 8 == 0 and", IN_DEQUANTIZE),
    Mutation(DEQUANTIZE, "unit < left // 32 * 4", "unit < left // 32", IN_DEQUANTIZE),
    Mutation(DEQUANTIZE, "tl.broadcast_to(block[:, None]", "tl.broadcast_to(0 * block[:, None]", IN_DEQUANTIZE),
    Mutation(QUANTIZE, "words = n % 32 == 0", "words = n % 8 == 0", IN_QUANTIZE),
    Mutation(QUANTIZE, "tl.broadcast_to(block[:, None]", "tl.broadcast_to(0 * block[:, None]", IN_QUANTIZE),
    Mutation(LINEARS, "flat, a, paths[0], p, seed", "flat, a, paths[0], 0.0, seed", IN_LINEARS),
    Mutation(LINEARS, "1 / (1 - p), p, seed, path, d_x)", "1 / (1 - p), p, seed, path)", IN_LINEARS_BACKWARD),
    Mutation(LOW_RANK, "path, factor=scaling", "path, factor=1.0", IN_BACKWARD),
    Mutation(LOW_RANK, "torch.mm(d_s.T, x)", "torch.mm(d_s.T, -x)", IN_BACKWARD),
    Mutation(
        LOW_RANK, "total.addmm_(hidden, lora_b.T, alpha", "total.addmm_(hidden, lora_b.T, beta=0, alpha", IN_TOTAL
    ),
    Mutation(PACKED, "beta=int(begun)", "beta=0", IN_NF4),
    Mutation(PACKED, "dropout > 0 or total is not None", "total is not None", IN_NF4_COLUMNS),
    Mutation(PACKED, "lora_a[:rank, first:end].T", "lora_a[:rank, : end - first].T", IN_NF4_COLUMNS),
    Mutation(PACKED, 'path == "library" or dropout > 0 or total is not None', "dropout > 0", IN_NF4_ADDED),
    Mutation(COLUMNS, "first_tile * BLOCK_K + begin", "begin", IN_COLUMNS),
    Mutation(COLUMNS, "n = (tile // across)", "n = (tile % across)", IN_COLUMNS),
    Mutation(EAGER, "first += abs(length)", "first += 1", IN_SIBLINGS_COMPUTE),
    Mutation(EAGER, "any(t.requires_grad for a in args", "any(False for a in args", IN_DIFFERENTIATED),
    Mutation(EAGER, "return make(x)", "return hidden", IN_SECOND),
    Mutation("lora_core/backends.py", "if why_not_launched() is None:", "if True:", IN_BUILT),
    Mutation(SIBLINGS, "held.x() is x and", "held.x() is not None and", IN_SIBLINGS),
    Mutation(SIBLINGS, "return x._version, x.requires_grad", "return 0, x.requires_grad", IN_SIBLINGS),
    Mutation(SIBLINGS, "held.states[place] != layer.term_state(x)", "False", IN_HELD),
    Mutation(SIBLINGS, "if any(layer.dropout for", "if False and any(layer.dropout for", IN_DRAWN),
    Mutation(SIBLINGS, " or m._forward_pre_hooks for", " for", IN_HOOKED),
    Mutation(
        SIBLINGS, "return id(t), t.data_ptr(), t.requires_grad, ", "return id(t), 0, t.requires_grad, ", IN_CHANGED
    ),
    Mutation(
        "lora_core/layers/fused_lora.py", "return [version_of(t) for t in base], pairs", "return pairs", IN_CHANGED
    ),
    Mutation("lora_core/ops/lora_linears.py", "if grads[i] is not None]", "]", IN_UNUSED),
    Mutation(EAGER, "type(made)(map(without_view, made))", "made", IN_PLACE),
    Mutation(EAGER, "like.new_empty(0) if t is None else t for t in made", "t for t in made", IN_NONE),
    Mutation(CHECKS, "forward_ad._current_level >= 0 or (", "(", IN_TRANSFORM),
    Mutation(
        "lora_core/adapt/merge.py",
        "        _take_out(model)\n        raise",
        "        raise",
        IN_STOPPED + "test_a_merge_that_is_stopped",
    ),
    Mutation(
        "lora_core/adapt/merge.py", "replace(model, where, layer)\n", "pass\n", IN_STOPPED + "test_merging_for_good"
    ),
    Mutation("lora_core/adapt/disable.py", "part.off.blocks -= 1", "part.off.blocks = 0", IN_OVERLAPPING),
    Mutation("lora_core/adapt/write_files.py", "os.replace(previous, config)", "pass", IN_PUT_BACK),
    Mutation(EAGER, "with outside_autocast(_first(args)):", "if True:", IN_AUTOCAST),
    Mutation(EAGER, "if not torch._C._functorch.is_legacy_batchedtensor(_first(args)) and", "if", IN_BATCH),
    Mutation("lora_core/adapt/bypassed.py", "frozenset(read - called)", "frozenset()", IN_BYPASSED),
    Mutation("lora_core/adapt/bypassed.py", "if answer is not False:", "if True:", IN_BRANCH),
    Mutation("lora_core/adapt/bypassed.py", "training or asks", "training", IN_TRAINING),
    Mutation("lora_core/adapt/save.py", "if found[place].shape != shape:", "if False:", IN_SHARE),
    Mutation("lora_core/adapt/walk.py", "if part not in WRAPPED", "if part", IN_WRAPPED),
    Mutation("lora_core/layers/adapter.py", "if trained else y", "if not trained else y", IN_MERGED),
    Mutation(CPU, "_rows_summed(hidden, d_y, scaling)", "_rows_summed(hidden, d_y)", IN_CPU_ROWS),
    Mutation("lora_core/ops/scaled.py", "beta=0, alpha=factor", "beta=0", IN_SCALED_PRODUCT),
    Mutation(PACKED, "bias[first:end]", "bias[: end - first]", IN_PANELS_OF_ROWS),
    Mutation(REACH, "(size > 1 or value.dim() == 2)", "size > 1", IN_ONE_ROW),
    Mutation(
        CROSSOVER,
        "own = (self.m, self.n, self.k, self.r)",
        "own = (self.m, self.k, self.n, self.r)",
        IN_SIDES,
    ),
    Mutation("lora_core/demo/data.py", "torch.arange(limit) * count // limit", "torch.arange(limit)", IN_WINDOWS),
    Mutation("lora_core/demo/sample.py", "tokens[-base.config.context :]", "tokens", IN_SAMPLE),
    Mutation(CPU_GROUPED, "if _is_finite(y):", "if True:", IN_CPU_GROUPED),
    Mutation(CPU_GROUPED, "index_copy_(0, order, by_adapter)", "copy_(by_adapter)", IN_CPU_GROUPED_BACKWARD),
    Mutation(CPU_PRODUCT, 'b, dense, "none"', 'b, None, "none"', IN_PRODUCT),
    Mutation(CPU_PRODUCT, 'b, None, "add")', 'b, None, "mul")', IN_ADD_PRODUCT),
    Mutation(FUSED, ".weight, layer.scaling[name]", ".weight, layer.scaling[name] * 1.01", IN_FUSE),
    Mutation(
        FUSED,
        "isinstance(dropout, nn.Dropout) and dropout.training",
        "isinstance(dropout, nn.Dropout)",
        "test_adapt_fuse.py::test_fused_dropout_drops_in_training_alone",
    ),
    Mutation(
        "lora_core/layers/bitsandbytes_weight.py",
        "None if nested is None else state.offset",
        "None if nested is None else state.offset * 1.01",
        IN_FUSE,
    ),
    Mutation(
        CROSSOVER,
        "self.fused_ms < self.library_ms",
        "self.fused_ms > self.library_ms",
        "test_kernels_crossover.py::test_faster_path_is_that_of_the_nearest",
    ),
    Mutation(SIXTEEN, "every(0x7FFF)", "every(0x8000)", IN_CPU_SCALES),
    Mutation(SIXTEEN, "every(0x7FC0)", "rounded", IN_CPU_SCALES),
    Mutation(COMPILED, "scale, stop = absmax[block]", "scale, stop = absmax[0]", IN_CPU_DECODE),
    Mutation(COMPILED, "scales.absmax2[block]", "scales.absmax2[0]", IN_CPU_CHUNKS),
    Mutation(COMPILED, "absmax[whole // block_size], short", "absmax[first // block_size], short", IN_CPU_DECODE),
    Mutation(SHARED, '"add", begins, step', '"add", begins, count', IN_SHARED),
    Mutation(SHARED, "several.type(1)", "several.type(3)", IN_SHARED),
    Mutation(SHARED, "builder.store(FLAG(1), ", "builder.store(FLAG(0), ", IN_FAILED),
    Mutation(SHARED, "array.meminfo = ir.Constant(array.meminfo.type, None)", "pass", IN_COUNTED),
    Mutation(SHARED, "kind if isinstance(kind, types.BaseTuple) else ()", "()", IN_COUNTED),
    Mutation(COMPILED_PRODUCT, "begins[c] = start % block_size", "begins[c] = 0", IN_FEW_ROWS),
    Mutation(COMPILED_TILE, "builder.sub(k, whole)", "number(0)", IN_TILE),
    Mutation(COMPILED_TILE, '"<", number(c), size', '"<=", number(c), size', IN_TILE),
    Mutation(COMPILED_PICKED, "builder.shl(byte, ir.Constant(byte.type, 1))", "byte", IN_FEW_ROWS),
    Mutation(COMPILED_PICKED, "ir.Constant(line.type, side)", "ir.Constant(line.type, 0)", IN_FEW_ROWS),
    Mutation(COMPILED_SPREAD, "builder.select(is_there, g, nothing)", "g", IN_INFINITE_ROW),
    Mutation(COMPILED_SPREAD, "builder.select(is_there, v, none)", "v", IN_INFINITE_ROW),
    Mutation(COMPILED_SPREAD, "load(builder, at, VECTOR)", "none", IN_FEW_ROWS_BACK),
    Mutation(
        "lora_core/cpu/nf4_lora_linear.py",
        "add_low_rank(base, d_s.float()",
        "add_low_rank(base, 2 * d_s.float()",
        IN_FEW_ROWS_BACK,
    ),
    Mutation(
        "lora_core/cpu/compiled/stream.py",
        '.set_metadata("nontemporal", hint)',
        "",
        "test_cpu_stream.py::test_streaming_is_what",
    ),
    Mutation("lora_core/cpu/nf4_dequantize.py", ">= STREAMED_BYTES", "< STREAMED_BYTES", IN_STREAMED),
    Mutation(SIXTEEN, "types.int16: (as_float16,", "types.int16: (as_bfloat16,", IN_CPU_DECODE),
    Mutation(COMPILED, "quotient <= midpoint", "quotient < midpoint", IN_CPU_ENCODE),
    Mutation("lora_core/cpu/compiled/pick.py", '">=", half', '">", half', IN_CPU_PICK),
    Mutation("lora_core/cpu/absmax_dequantize.py", "offset, block_size), ", "offset, 256), ", IN_CPU_SCALES_ALONE),
    Mutation(PLAIN, "scales[at + whole // block_size]", "scales[at]", IN_CPU_DECODE),
    Mutation(
        "lora_core/ops/nf4_lora_linear.py",
        "    ctx.format = (shape, block_size, nested_block_size)\n",
        "    ctx.format = (shape, block_size, nested_block_size)\n"
        "    ctx.kept = Packed(*packed, *ctx.format).dense(x.dtype)\n",
        "test_ops_modes.py::test_no_dense_weight_outlives",
    ),
    Mutation(
        "lora_core/cpu/lora_linear.py",
        "if need_weight and x is not None else None",
        "if x is not None else None",
        "test_ops_modes.py::test_backward_of_a_frozen_weight_forms_no_gradient",
    ),
    Mutation(
        "quant/parts.py",
        "if tensor.numel() != size:",
        "if tensor.numel() < size:",
        "test_quant_parts.py::test_parts_that_do_not_belong_together",
    ),
    Mutation(
        "quant/weight.py",
        "value.to(device, copy=True)",
        "value.to(device)",
        "test_quant_state.py::test_loading_a_state_keeps_nothing",
    ),
    Mutation(
        "lora_core/adapt/merge.py",
        "layer.read_weight().clone()",
        "layer.read_weight()",
        "test_adapt_merge.py::test_report_measures_the_error",
    ),
    Mutation(
        "lora_core/adapt/mergeable.py",
        "torch.finfo(layer.weight.dtype).max / 2",
        "math.inf",
        "test_adapt_merge.py::test_an_update_that_overflows",
    ),
    Mutation("lora_core/adapt/walk.py", "owner._initialize()", "pass", "test_adapt_compiled_parts.py::test_a_merge"),
    Mutation(
        "lora_core/layers/fused.py",
        "self.__getstate__()",
        "self.__dict__",
        "test_adapt_compiled_parts.py::test_a_copy_of_fused",
    ),
    Mutation("lora_core/cpu/dropout.py", "key = id(seed), p", "key = 0, p", "test_cpu_dropout.py::test_a_backward"),
    Mutation("lora_core/cpu/dropout.py", "MASK_32 >> shift", "MASK_32", "test_cpu_dropout.py::test_drops_what"),
    Mutation(
        "lora_core/cpu/compiled/dropout.py",
        "(h >> FIFTEEN)",
        "(h >> SIXTEEN)",
        "test_cpu_dropout.py::test_drops_what",
    ),
    Mutation(
        CPU_NORM,
        "parts[m // rows]",
        "parts[0]",
        "test_cpu_elementwise.py::test_gradient_of_a_norms_weight",
    ),
    Mutation(CPU_NORM, "(h - n * mean)", "(h + n * mean)", "test_cpu_elementwise.py::test_rows_longer"),
    Mutation(
        CPU_ROTARY, "x1 * widened(c[i]) - x2", "x1 * widened(c[i]) + x2", "test_cpu_elementwise.py::test_bfloat16"
    ),
    Mutation(CPU_GATE, "g * (ONE - sigma)", "g * sigma", "test_cpu_elementwise.py::test_gates_of_every_size"),
    Mutation(FLOATS, "WORD(0x7FFF)", "WORD(0x8000)", "test_cpu_elementwise.py::test_bfloat16"),
    Mutation(FLOATS, "(5040, 720,", "(720,", "test_cpu_elementwise.py::test_logistic"),
    Mutation(CPU_ATTENTION, "multiply(transposed(grads)", "multiply(transposed(scores)", IN_ATTENTION),
    Mutation(CPU_ATTENTION, "* inverse\n    for j in range(p.size)", "\n    for j in range(p.size)", IN_ATTENTION),
    Mutation(CPU_ATTENTION, "(g[j] - mean) * scale", "g[j] - mean", IN_ATTENTION),
    Mutation(CPU_ATTENTION, "    _clear(grad[seen:])\n", "", IN_ATTENTION),
    Mutation(CPU_ATTENTION, "scatter(of_keys, b, g, d_k)", "scatter(of_keys, b, 0, d_k)", IN_ATTENTION),
    Mutation(CPU_ATTENTION, "_largest(part)", "part[0]", "test_cpu_causal_attention.py::test_what_is_below"),
    Mutation(PANEL, "with builder.if_then(add):", "with builder.if_then(builder.not_(add)):", IN_PANEL),
    Mutation(PANEL, "b.at(builder.add(begin, j))", "b.at(begin)", IN_PANEL),
    Mutation(PANEL, "for j in range(wide, n, LANES)", "for j in range(wide, n - LANES, LANES)", IN_PANELS_OF),
    Mutation(
        "lora_core/ops/rms_norm.py",
        "weight, ctx.eps)[1]",
        "weight, 0.0)[1]",
        "test_ops_elementwise.py::test_a_gradient_that_may_be_differentiated",
    ),
    Mutation(
        "lora_core/ops/ready.py",
        "and of_one_kind(*tensors)\n        and forward_ad._current_level < 0",
        "and of_one_kind(*tensors)",
        "test_ops_elementwise.py::test_tangents",
    ),
    Mutation(
        ATTENDING, "not rest and not options and", "not options and", "test_adapt_blocks_fall_back.py::test_rotations"
    ),
    Mutation(
        BETWEEN,
        "else self.act_fn(gate) * up",
        "else self.act_fn(up) * gate",
        "test_adapt_blocks_fall_back.py::test_gates",
    ),
    Mutation(ATTENDING, "if found is self._attend else found", "", f"{OF_ATTENTION}::test_a_function_of_ones_own"),
    Mutation(ATTENDING, " and forward is kind.fused_forward", "", f"{OF_ATTENTION}::test_a_forward_that_takes"),
    Mutation(ATTENDING, "{*loads(forward, REGISTRY)} == {ASKED}", "True", f"{OF_ATTENDING}::test_what_asks"),
    Mutation(ATTENDING, "if causal is None else causal", "", f"{OF_ATTENTION}::test_what_masks"),
    Mutation(ATTENDING, "and query.shape[2] > 1", "", f"{OF_ATTENDING}::test_what_is_left"),
    Mutation(
        ATTENDING,
        "for name, value in options.items() if name in heeded",
        "for value in ()",
        f"{OF_ATTENDING}::test_what_is_left",
    ),
    Mutation(
        ATTENDING,
        "if own and not hasattr",
        "if found and not hasattr",
        f"{OF_ATTENDING}::test_a_function_of_transformers",
    ),
    Mutation(RECOGNISED, "llama.LlamaMLP.forward(mlp, x),", "swiglu(x, other),", IN_OTHER_LLAMAS),
    Mutation(
        "lora_core/adapt/fuse.py",
        'module.__dict__.pop("forward", None)',
        "pass",
        "test_adapt_blocks_recognised.py::test_a_forward_that_hooks",
    ),
    Mutation(
        "lora_core/adapt/merge.py",
        "part.merged = part.merged or Merged(names)",
        "part.merged = part.merged",
        "test_adapt_merge_named.py::test_merging_named_adapters_runs",
    ),
)


def main() -> int:
    """Run the tests unchanged and with each mutation; return 0 if all were green and all turned red."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help=f"plant every {SAMPLED}th mutation only")
    options = parser.parse_args()
    chosen = MUTATIONS[::SAMPLED] if options.sample else MUTATIONS
    with tempfile.TemporaryDirectory() as folder:
        clean = _copy(Path(folder) / "clean")
        with ThreadPoolExecutor(WORKERS) as pool:
            for code, output in pool.map(lambda test: _pytest(clean, test), sorted({m.test for m in chosen})):
                if code != 0:
                    print(f"a test is red without any mutation:\n{output[-4000:]}")
                    return 1
            outcomes = list(pool.map(lambda pair: _plant(Path(folder) / str(pair[0]), pair[1]), enumerate(chosen)))
    survived = [m for m, red in zip(chosen, outcomes, strict=True) if not red]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} planted errors were seen")
    return 1 if survived else 0


def _plant(folder: Path, mutation: Mutation) -> bool:
    """Return whether the mutation's test turned red; say so in a line."""
    path = _copy(folder) / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times; want once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    code, output = _pytest(folder, mutation.test, "planted")
    # 1 is a failed test; anything else is a test that did not run
    if code not in (0, 1):
        raise RuntimeError(f"{mutation.test} could not run (exit {code}):\n{output[-4000:]}")
    first_line = mutation.old.strip().splitlines()[0]
    print(f"{'seen' if code else 'SURVIVED'}: {mutation.file}: {first_line}", flush=True)
    shutil.rmtree(folder)
    return code == 1


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def _pytest(folder: Path, test: str, profile: str = "default") -> tuple[int, str]:
    """Run a test in a folder, on its sources, with hypothesis' settings of a name; return exit code and output."""
    file, _, name = test.partition("::")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", name, f"tests/{file}"]
    # the copy's own examples, not those that a run before found
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / ".hypothesis"),
        "HYPOTHESIS_PROFILE": profile,
    }
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


if __name__ == "__main__":
    sys.exit(main())
