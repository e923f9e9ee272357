"""Figures often quoted for LoRA: what is said, what the quoted formula gives, and what is right.

Every number but `said` is computed here, from the shapes of the catalogue.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_core.plan.catalogue import find_shape
from lora_core.plan.memory import plan_memory, quantized_bytes
from lora_core.plan.parameters import houlsby_parameters, ia3_parameters, lora_parameters, prefix_parameters
from lora_core.plan.setup import Setup

GIGA = 10**9
# an A100's memory in the quoted sums
A100_BYTES = 80 * GIGA
# the model sizes that the quoted sums use, rounded
BILLIONS_7 = 7 * GIGA
BILLIONS_65 = 65 * GIGA
# the QLoRA paper's 4-bit format: elements sharing a scale
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Figure:
    """One quoted figure.

    Args:
        subject: what it is about.
        said: the number as quoted.
        formula: the formula quoted with it, or the one that gives it.
        from_formula: what that formula gives.
        right: the right number.
        why: what the right number is, with its source where it is not plain arithmetic.
        unit: of all three.
        beside: numbers that `why` mentions, by what they are.
    """

    subject: str
    said: float
    formula: str
    from_formula: float
    right: float
    why: str
    unit: str = ""
    beside: dict[str, float] = field(default_factory=dict)


def figures() -> list[Figure]:
    """All figures, in the order: adapters, shares of a model, memory, other methods."""
    return [figure for group in (_adapters, _models, _memory, _table_65b, _other_methods) for figure in group()]


def _adapters() -> list[Figure]:
    dense = 64 * 64
    return [
        Figure(
            "LoRA on 64 x 64, r = 8", 1024, "r (d + d)", 8 * (64 + 64), 8 * (64 + 64), f"against {dense:,} dense",
            beside={"dense": dense},
        ),
        Figure("saving at d = 4096, r = 16", 128, "d / 2r", 4096 / 32, 4096 / 32, "d^2 / (2 d r)", "x"),
        Figure(
            "saving at d = 4096, r = 16, second quote", 256, "d / r", 4096 / 16, 4096**2 / (2 * 4096 * 16),
            "A and B both count, so d / 2r; d / r forgets one", "x",
        ),
        Figure(
            "rank-16 SVD of 4096 x 4096", 131_088, "r (2d + 1)", 16 * (2 * 4096 + 1), 16 * (2 * 4096 + 1),
            "U, V and the singular values",
        ),
    ]  # fmt: skip


def _models() -> list[Figure]:
    llama, llama70, gpt3 = find_shape("Llama-2-7B"), find_shape("Llama-2-70B"), find_shape("GPT-3")
    mistral = find_shape("Mistral-7B")
    qkvo = lora_parameters(llama, 16, "attention")
    everywhere = lora_parameters(llama, 16)
    everywhere70 = lora_parameters(llama70, 16)
    gpt3_qv = lora_parameters(gpt3, 4, ("q_proj", "v_proj"))
    fewer, states = llama.parameters / qkvo, _state_bytes("GPT-3", "full") / _state_bytes("GPT-3", "lora")
    square70 = 4 * llama70.layers * 16 * 2 * llama70.hidden
    return [
        Figure(
            "GPT-3: times fewer parameters", 10_000, "350 GB / 35 MB", 350e9 / 35e6, gpt3.parameters / gpt3_qv,
            "r = 4 on q and v (Hu et al. 2021, section 4.2); Llama-2-7B, q,k,v,o at r = 16: "
            f"{fewer:.0f} x", "x", {"Llama-2-7B, q,k,v,o, r = 16": fewer},
        ),
        Figure(
            "GPT-3: times less memory", 3, "1.2 TB / 350 GB", 1.2e12 / 350e9, 1.2e12 / 350e9,
            f"measured (Hu et al. 2021, section 4.2); weights, gradients and states alone, computed: {states:.1f} x",
            "x", {"states alone, computed": states},
        ),
        Figure("Llama-2-7B, q,k,v,o, r = 16", 16_777_216, "32 x 4 x 2 d r", 32 * 4 * 2 * 4096 * 16, qkvo, "the same"),
        Figure(
            "... of all parameters", 0.24, "16.8M / 7B", 100 * 16.8e6 / 7e9, 100 * qkvo / llama.parameters,
            f"of {llama.parameters:,}", "%",
        ),
        Figure(
            "Llama-2-7B, seven targets, r = 16", 13_631_488, "q,k,v,o of a Mistral shape",
            lora_parameters(mistral, 16, "attention"), everywhere, "the MLP's three matrices count",
        ),
        Figure(
            "... all parameters", 6_751_809_536, "6,738,178,048 + 13,631,488", 6_738_178_048 + 13_631_488,
            llama.parameters + everywhere, "base and adapters",
        ),
        Figure(
            "... trainable", 0.2019, "13,631,488 / 6,751,809,536", 100 * 13_631_488 / 6_751_809_536,
            100 * everywhere / (llama.parameters + everywhere), "as print_trainable_parameters prints it", "%",
        ),
        Figure(
            "Llama-2-70B, seven targets, r = 16", 83_886_080, "80 x 4 x 2 d r", square70, everywhere70,
            "8 key heads make k and v narrower, and the MLP counts",
        ),
        Figure(
            "... all parameters", 68_977_704_960, "68,893,818,880 + 83,886,080", 68_893_818_880 + 83_886_080,
            llama70.parameters + everywhere70, "base and adapters",
        ),
        Figure(
            "... trainable", 0.1216, "83,886,080 / 68,977,704,960", 100 * 83_886_080 / 68_977_704_960,
            100 * everywhere70 / (llama70.parameters + everywhere70), "as print_trainable_parameters prints it", "%",
        ),
        Figure(
            "adapter file", 50, "none", 50, 2 * qkvo / 1e6,
            f"q,k,v,o in fp16; all-linear in fp32 takes {4 * everywhere / 1e6:.0f} MB (Llama-2-7B, r = 16)", "MB",
            {"all-linear in fp32": 4 * everywhere / 1e6},
        ),
    ]  # fmt: skip


def _memory() -> list[Figure]:
    parts = [("weights", 14, 2), ("gradients", 14, 2), ("momentum", 28, 4), ("variance", 28, 4)]
    rows = [
        Figure(f"7B, {name}", said, f"{size}N", size * BILLIONS_7 / GIGA, size * BILLIONS_7 / GIGA, "the same", "GB")
        for name, said, size in parts
    ]
    return [
        *rows,
        Figure(
            "7B, all of full fine-tuning", 84, "2N + 2N + 4N + 4N = 12N", 12 * BILLIONS_7 / GIGA,
            16 * BILLIONS_7 / GIGA, "16N: the fp32 master copy is 4N more (Rajbhandari et al. 2019, section 3.1)", "GB",
        ),
        Figure(
            "80 GB cards for the 65B model's states", 10, "780 / 80", 12 * BILLIONS_65 / A100_BYTES,
            -(-8 * BILLIONS_65 // A100_BYTES), "states alone are 8N, 520 GB: 6.5 cards, so 7; 780 GB is everything",
            "cards",
        ),
    ]  # fmt: skip


def _table_65b() -> list[Figure]:
    shape = find_shape("LLaMA-65B")
    qv = lora_parameters(shape, 16, ("q_proj", "v_proj"))
    attention, everywhere = (2 * lora_parameters(shape, 16, names) / GIGA for names in ("attention", "all-linear"))
    bare, nested, plain = (
        bytes_of(BILLIONS_65) / GIGA for bytes_of in (lambda n: n / 2, _with_scales(True), _with_scales(False))
    )
    n = BILLIONS_65 / GIGA
    adapter, bits = 2 * qv / GIGA, 8 * nested / n
    return [
        Figure("65B full: weights", 130, "2N", 2 * n, 2 * n, "the same", "GB"),
        Figure("65B full: gradients", 130, "2N", 2 * n, 2 * n, "the same", "GB"),
        Figure("65B full: optimiser states", 520, "8N", 8 * n, 8 * n, "the same", "GB"),
        Figure(
            "65B full: fp32 master copy", 0, "0N", 0, 4 * n,
            "4N, left out; counted among the states by Rajbhandari et al. 2019, section 3.1", "GB",
        ),
        Figure("65B full: total", 780, "12N", 12 * n, 16 * n, "16N", "GB"),
        Figure(
            "65B LoRA: adapters", 0.08, "r = 16 on q and v in fp16", adapter, adapter,
            f"q,k,v,o: {attention:.3f}, all-linear: {everywhere:.2f}", "GB",
            {"q,k,v,o": attention, "all-linear": everywhere},
        ),
        Figure("65B LoRA: gradients", 0.08, "as the adapters", adapter, adapter, "the same", "GB"),
        Figure("65B LoRA: optimiser states", 0.32, "4 x adapters", 4 * adapter, 4 * adapter, "two fp32 states", "GB"),
        Figure(
            "65B LoRA: total", 130.5, "130 + .08 + .08 + .32", 2 * n + 6 * adapter, 2 * n + 6 * adapter,
            "without activations", "GB",
        ),
        Figure(
            "65B QLoRA: weights", 33, "N / 2", bare, nested,
            f"{bits:.3f} bits with double quantisation; {plain:.1f} without, {bare:.1f} for the codes alone", "GB",
            {"bits": bits, "without double quantisation": plain, "codes alone": bare},
        ),
        Figure(
            "65B QLoRA: total", 33.5, "33 + .08 + .08 + .32", 33 + 6 * adapter, nested + 6 * adapter,
            "without activations", "GB",
        ),
    ]  # fmt: skip


def _other_methods() -> list[Figure]:
    llama, llama3 = find_shape("Llama-2-7B"), find_shape("Llama-3-8B")
    prefix, houlsby, ia3 = prefix_parameters(llama, 20), houlsby_parameters(llama, 64, False), ia3_parameters(llama)
    prefix3, ia33 = prefix_parameters(llama3, 20), ia3_parameters(llama3)
    with_norms = houlsby_parameters(llama, 64)
    share, of_all = 100 / llama.parameters, f"of {llama.parameters:,}"
    quoted_houlsby = 32 * 2 * (2 * 4096 * 64 + 64)
    quoted_ia3 = 2 * 4096 + 16384
    return [
        Figure(
            "prefix of 20, 7B", 5_242_880, "2 L p d", 2 * 32 * 20 * 4096, prefix,
            f"the same; with 8 key heads (Llama-3-8B) {prefix3:,}", beside={"Llama-3-8B": prefix3},
        ),
        Figure("... of all parameters", 0.07, "5M / 7B", 100 * 5e6 / 7e9, share * prefix, of_all, "%"),
        Figure(
            "Houlsby adapters of 64, 7B", 33.6e6, "32 x 2 x (2 d m + m)", quoted_houlsby, houlsby,
            f"2 d m + d + m: the upper bias has d elements; with the norms it trains, {with_norms:,}",
            beside={"with norms": with_norms},
        ),
        Figure(
            "... of all parameters", 0.49, "34M / 7B", 100 * 34e6 / 7e9, share * houlsby, of_all, "%"
        ),
        Figure(
            "IA3, a layer", 24_576, "2 d + d_ff, d_ff = 16384", quoted_ia3, ia3 / 32, "d_ff of Llama-2-7B is 11,008"
        ),
        Figure(
            "IA3, 7B", 786_432, "32 x 24,576", 32 * quoted_ia3, ia3,
            f"with 8 key heads (Llama-3-8B) {ia33:,}", beside={"Llama-3-8B": ia33},
        ),
        Figure("... of all parameters", 0.01, "0.8M / 7B", 100 * 0.8e6 / 7e9, share * ia3, of_all, "%"),
    ]  # fmt: skip


def _with_scales(double_quant: bool) -> Callable[[int], int]:
    return lambda elements: quantized_bytes(elements, BLOCK_SIZE, double_quant)


def _state_bytes(model: str, method: str) -> int:
    """Weights, gradients and states of mixed-precision AdamW, without activations; LoRA with r = 4 on q and v."""
    setup = Setup(method=method, rank=4, targets=("q_proj", "v_proj"), adapter_bytes=2)
    plan = plan_memory(find_shape(model), setup)
    return sum(row.bytes for row in plan.rows if row.name not in ("activations", "workspace"))
