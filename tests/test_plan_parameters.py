"""Counts of trained parameters: closed forms against models that are really adapted."""

import pytest
import torch
from models import TINY, transformers_model

import lora_core as lc
from lora_core.adapt.count import count_parameters
from lora_core.errors import ConfigError
from lora_core.plan.catalogue import find_shape
from lora_core.plan.compare import compare_methods
from lora_core.plan.figures import figures
from lora_core.plan.parameters import houlsby_parameters, ia3_parameters, lora_parameters, prefix_parameters


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("targets", ["all-linear", "attention", ["down_proj", "k_proj"]])
def test_lora_count_is_that_of_an_adapted_model(rank, targets):
    model, shape = transformers_model(), TINY
    names = targets if targets == "all-linear" else [layer.name for layer in shape.targets(targets)]
    lc.add_adapter(model, lc.LoraConfig(r=rank, target_modules=names))
    adapters = lora_parameters(shape, rank, targets)
    assert count_parameters(model) == (adapters, shape.parameters + adapters)


@pytest.mark.peer("peft", "transformers")
def test_ia3_and_prefix_counts_are_those_of_peft():
    import peft

    shape = TINY
    assert shape.kv_heads < shape.heads
    ia3 = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = peft.get_peft_model(transformers_model(), ia3)
    assert ia3_parameters(shape) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    adapted = peft.get_peft_model(transformers_model(), prefix)
    assert prefix_parameters(shape, 7) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.peer("transformers")
def test_houlsby_count_is_that_of_the_layers_it_adds():
    shape = TINY
    bottleneck, norm = 3, transformers_model().model.layers[0].input_layernorm
    adapter = [torch.nn.Linear(shape.hidden, bottleneck), torch.nn.Linear(bottleneck, shape.hidden)]
    added = sum(p.numel() for layer in adapter for p in layer.parameters())
    assert houlsby_parameters(shape, bottleneck, train_norms=False) == 2 * shape.layers * added
    assert houlsby_parameters(shape, bottleneck) == 2 * shape.layers * (added + norm.weight.numel())


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_sizes_below_one_are_refused(count):
    shape = find_shape("Llama-2-7B")
    for call, name in (
        (lora_parameters, "rank"),
        (prefix_parameters, "prefix_length"),
        (houlsby_parameters, "bottlen"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.* is {count}; want a whole number of at least 1"):
            call(shape, count)


# what is said, and what is right, as published; keyed by the figure's place among those of one subject
QUOTED = {
    "LoRA on 64 x 64, r = 8": (1024, 1024),
    "saving at d = 4096, r = 16": (128, 128),
    "saving at d = 4096, r = 16, second quote": (256, 128),
    "rank-16 SVD of 4096 x 4096": (131_088, 131_088),
    "Llama-2-7B, q,k,v,o, r = 16": (16_777_216, 16_777_216),
    "Llama-2-7B, seven targets, r = 16": (13_631_488, 39_976_960),
    "Llama-2-70B, seven targets, r = 16": (83_886_080, 207_093_760),
    "7B, weights": (14, 14),
    "7B, gradients": (14, 14),
    "7B, momentum": (28, 28),
    "7B, variance": (28, 28),
    "7B, all of full fine-tuning": (84, 112),
    "80 GB cards for the 65B model's states": (10, 7),
    "65B full: weights": (130, 130),
    "65B full: gradients": (130, 130),
    "65B full: optimiser states": (520, 520),
    "65B full: fp32 master copy": (0, 260),
    "65B full: total": (780, 1040),
    "prefix of 20, 7B": (5_242_880, 5_242_880),
    "Houlsby adapters of 64, 7B": (33.6e6, 33_820_672),
    "IA3, a layer": (24_576, 19_200),
    "IA3, 7B": (786_432, 614_400),
}
# the same for figures that are published to so many decimals
ROUNDED = {
    "GPT-3: times fewer parameters": (10_000, 9251, 0),
    "GPT-3: times less memory": (3, 3.4, 1),
    "adapter file": (50, 34, 0),
    "65B LoRA: adapters": (0.08, 0.08, 2),
    "65B LoRA: gradients": (0.08, 0.08, 2),
    "65B LoRA: optimiser states": (0.32, 0.34, 2),
    "65B LoRA: total": (130.5, 130.5, 1),
    "65B QLoRA: weights": (33, 33.5, 1),
    "65B QLoRA: total": (33.5, 34.0, 1),
}
# of all parameters, in the order they stand: said, right, decimals
SHARES = [(0.24, 0.249, 3), (0.07, 0.078, 3), (0.49, 0.50, 2), (0.01, 0.009, 3)]
TRAINABLE = [(0.2019, 0.5898, 4), (0.1216, 0.2993, 4)]
ALL = [(6_751_809_536, 6_778_392_576), (68_977_704_960, 69_183_741_952)]


def test_figures_are_those_published():
    found = figures()
    named = {figure.subject: figure for figure in found if not figure.subject.startswith("...")}
    assert set(named) == set(QUOTED) | set(ROUNDED)
    for subject, (said, right) in QUOTED.items():
        assert (named[subject].said, named[subject].right) == (said, right), subject
    for subject, (said, right, decimals) in ROUNDED.items():
        assert (named[subject].said, round(named[subject].right, decimals)) == (said, right), subject
    for label, rows in (("... of all parameters", SHARES), ("... trainable", TRAINABLE)):
        for figure, (said, right, decimals) in zip((f for f in found if f.subject == label), rows, strict=True):
            assert (figure.said, round(figure.right, decimals)) == (said, right)
    every = [(f.said, f.right) for f in found if f.subject == "... all parameters"]
    assert every == ALL


# numbers beside those: what they are, their values as published, decimals
BESIDE = {
    "LoRA on 64 x 64, r = 8": {"dense": (4096, 0)},
    "GPT-3: times fewer parameters": {"Llama-2-7B, q,k,v,o, r = 16": (402, 0)},
    "GPT-3: times less memory": {"states alone, computed": (8.0, 1)},
    "adapter file": {"all-linear in fp32": (160, 0)},
    "65B LoRA: adapters": {"q,k,v,o": (0.168, 3), "all-linear": (0.40, 2)},
    "65B QLoRA: weights": {"bits": (4.127, 3), "without double quantisation": (36.6, 1), "codes alone": (32.5, 1)},
    "prefix of 20, 7B": {"Llama-3-8B": (1_310_720, 0)},
    "Houlsby adapters of 64, 7B": {"with norms": (34_082_816, 0)},
    "IA3, 7B": {"Llama-3-8B": (524_288, 0)},
}


def test_figures_beside_the_quoted_ones_are_those_published_and_told():
    named = {figure.subject: figure for figure in figures() if figure.beside}
    assert named.keys() == BESIDE.keys()
    for subject, numbers in BESIDE.items():
        found = named[subject].beside
        assert {what: round(value, numbers[what][1]) for what, value in found.items()} == {
            what: value for what, (value, _) in numbers.items()
        }
        for value, decimals in numbers.values():
            assert f"{value:,.{decimals}f}" in named[subject].why


def test_quoted_formulas_give_the_quoted_numbers():
    """Each formula gives what is said, to two digits; the exceptions are rounded to one digit in what is said."""
    by_itself = {f.subject for f in figures() if abs(f.from_formula - f.said) > 0.05 * f.said}
    # the paper's 1.2 TB / 350 GB is 3.4, quoted as 3; 0.8M / 7B is 0.0114 %, quoted as 0.01 %; 0.335 GB as 0.32
    assert by_itself == {"GPT-3: times less memory", "... of all parameters"}


def test_comparison_has_the_six_methods():
    rows = compare_methods(find_shape("Llama-2-7B"))
    assert [row.trainable for row in rows] == [
        6_738_415_616,
        16_777_216,
        16_777_216,
        5_242_880,
        34_082_816,
        614_400,
    ]
    assert [round(100 * row.share, 2) for row in rows] == [100.0, 0.25, 0.25, 0.08, 0.51, 0.01]
