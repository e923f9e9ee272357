"""Choosing layers and putting adapters into models."""

import copy
import warnings

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from torch import nn

import lora_core as lc
from lora_core.adapt.count import count_parameters
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.trainable_copy import TrainableCopy

LINEAR = ["attn.q_proj", "attn.v_proj", "up_proj", "down_proj"]


def adapt(model=None, name="default", **config):
    config = {"r": 2, "target_modules": "all-linear", **config}
    return lc.add_adapter(model or TinyDecoder(), lc.LoraConfig(**config), name)


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["q_proj"], [f"layers.{i}.attn.q_proj" for i in range(3)]),
        (["layers.1.up_proj"], ["layers.1.up_proj"]),
        ("layers\\.[02]\\..*v_proj", ["layers.0.attn.v_proj", "layers.2.attn.v_proj"]),
        ("all-linear", [f"layers.{i}.{n}" for i in range(3) for n in LINEAR]),
        ("ALL-LINEAR", [f"layers.{i}.{n}" for i in range(3) for n in LINEAR]),
        (["embed_tokens", "lm_head"], ["embed_tokens", "lm_head"]),
    ],
    ids=str,
)
def test_targets_are_found_by_suffix_expression_and_shorthand(wanted, expected):
    assert list(adapter_layers(adapt(target_modules=wanted))) == expected


def test_targets_match_whole_parts_of_a_name_only():
    """'proj' is no suffix of 'q_proj' unless a dot stands before it."""
    with pytest.raises(lc.TargetNotFoundError):
        adapt(target_modules=["proj"])


@pytest.mark.parametrize("excluded", [["q_proj", "layers.0.up_proj"], r".*q_proj|layers\.0\.up_proj"], ids=str)
def test_excluded_modules_are_left_out(excluded):
    found = list(adapter_layers(adapt(exclude_modules=excluded)))
    assert not any("q_proj" in n for n in found)
    assert "layers.0.up_proj" not in found and "layers.1.up_proj" in found


@pytest.mark.parametrize("chosen", [1, [0, 2]])
@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"]])
def test_layers_to_transform_picks_layers(chosen, pattern):
    found = list(adapter_layers(adapt(layers_to_transform=chosen, layers_pattern=pattern)))
    wanted = [chosen] if isinstance(chosen, int) else chosen
    assert found == [f"layers.{i}.{n}" for i in wanted for n in LINEAR]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_out_whatever_its_name(tied):
    model = TinyDecoder(tied=tied)
    model.unembedding = model.lm_head
    del model.lm_head
    model.forward = None
    assert "unembedding" not in adapter_layers(adapt(model))


def test_all_linear_takes_every_layer_of_a_plain_stack():
    model = adapt(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert list(adapter_layers(model)) == ["0", "2"]


def test_target_not_found_lists_the_closest_names_first_and_changes_nothing():
    model = TinyDecoder()
    with pytest.raises(lc.TargetNotFoundError, match=r"\['qproj'\].*want one of: q_proj"):
        adapt(model, target_modules=["qproj"])
    assert not adapter_layers(model) and trained(model) == {n for n, _ in model.named_parameters()}


def test_target_not_found_names_the_limits_that_emptied_the_choice():
    with pytest.raises(lc.TargetNotFoundError, match=r"layers_to_transform=7"):
        adapt(layers_to_transform=7)


def test_unmatched_entry_of_a_target_list_is_warned_of():
    with pytest.warns(UserWarning, match="'query'"):
        adapt(target_modules=["q_proj", "query"])


@pytest.mark.parametrize(("wanted", "kind"), [(["norm"], "LayerNorm"), (["attn"], "Attention")])
def test_target_of_a_kind_that_cannot_be_adapted_is_refused(wanted, kind):
    model = TinyDecoder()
    with pytest.raises(lc.ConfigError, match=f"{kind}.*nn.Linear"):
        adapt(model, target_modules=["q_proj", *wanted])
    assert not adapter_layers(model)


def test_targets_left_unset_are_refused():
    with pytest.raises(lc.ConfigError, match="target_modules is not set.*all-linear"):
        adapt(target_modules=None)


def test_attention_that_bypasses_its_projection_is_refused_and_left_out():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(lc.ConfigError, match="MultiheadAttention"):
        adapt(model, target_modules=["out_proj"])
    assert list(adapter_layers(adapt(model))) == ["1"]


@pytest.mark.parametrize("name", ["", "a.b", None])
def test_adapter_names_that_cannot_be_keys_are_refused(name):
    with pytest.raises(lc.AdapterError, match="without dots"):
        adapt(name=name)


def test_adapter_name_that_is_taken_is_refused():
    model = adapt()
    with pytest.raises(lc.AdapterError, match="'default' already"):
        adapt(model)


def test_config_of_another_type_is_refused():
    with pytest.raises(lc.ConfigError, match="builtins.dict; want a lora_core.LoraConfig"):
        lc.add_adapter(TinyDecoder(), {"r": 8})


def test_add_adapter_returns_the_model_and_trains_its_matrices_only():
    model = TinyDecoder()
    assert adapt(model) is model
    assert trained(model) == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(trained(model)) == 2 * 12


def test_adding_a_second_adapter_trains_it_alone():
    model = adapt(adapt(name="one"), name="two", target_modules=["q_proj"])
    assert trained(model) == {n for n, _ in model.named_parameters() if n.endswith("two")}


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 9), ("all", 10)])
def test_biases_are_trained_as_asked(bias, count):
    model = adapt(bias=bias)
    names = [n for n in trained(model) if n.endswith("bias")]
    assert len(names) == count
    if bias == "lora_only":
        assert all(".base_layer.bias" in n for n in names)


def test_a_module_that_is_trained_whole_runs_no_copy_of_a_name_that_was_removed_until_it_is_chosen():
    model = TinyDecoder()
    adapt(model, modules_to_save=["lm_head"])
    copies = model.lm_head
    adapter = copies.adapters["default"]
    assert copies.running() is copies.copies["default"]
    copies.remove("default")
    assert copies.active is None and copies.running() is copies.original
    copies.add("default", adapter)
    assert copies.running() is copies.original
    copies.activate(("default",))
    assert copies.running() is copies.copies["default"]


def test_biases_of_whole_numbers_are_not_trained():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "shifted": nn.Module()})
    model.shifted.bias = nn.Parameter(torch.arange(8), requires_grad=False)
    adapt(model, target_modules=["linear"], bias="all")
    assert {n for n in trained(model) if "lora_" not in n} == {"linear.base_layer.bias"}


def test_modules_to_save_are_trained_in_a_copy():
    model = TinyDecoder()
    before, original = model(tokens()), model.lm_head
    adapt(model, modules_to_save=["lm_head", "norm"])
    assert isinstance(model.lm_head, TrainableCopy) and model.lm_head.original is original
    assert torch.equal(model(tokens()), before)
    extra = trained(model) - {n for n, _ in model.named_parameters() if "lora_" in n}
    assert extra == {"lm_head.copies.default.weight", "norm.copies.default.weight", "norm.copies.default.bias"}
    with torch.no_grad():
        model.lm_head.copies["default"].weight.zero_()
    assert not model(tokens()).any()
    with lc.disable_adapter(model):
        assert torch.equal(model(tokens()), before)


def test_modules_to_save_alone_make_an_adapter():
    model = adapt(target_modules=None, modules_to_save=["lm_head"])
    assert trained(model) == {"lm_head.copies.default.weight"}


def test_modules_to_save_that_do_not_exist_are_refused():
    model = TinyDecoder()
    with pytest.raises(lc.TargetNotFoundError, match="'heads'.*lm_head"):
        adapt(model, modules_to_save=["heads"])
    assert not adapter_layers(model)


def test_modules_to_save_of_a_tied_weight_are_warned_of():
    with pytest.warns(UserWarning, match="lm_head.weight is tied to embed_tokens.weight"):
        adapt(TinyDecoder(tied=True), modules_to_save=["lm_head"])


def test_injection_shares_the_base_weights():
    model = TinyDecoder()
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    adapt(model)
    assert {
        n.replace(".base_layer", ""): p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n
    } == before


def test_a_layer_used_twice_is_adapted_in_both_places():
    shared = nn.Linear(6, 6)
    model = adapt(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and len(adapter_layers(model)) == 1
    lc.delete_adapter(model, "default")
    assert model[0] is shared and model[2] is shared


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(4, 4, 1, groups=2))
    layers = list(model)
    with pytest.raises(lc.ConfigError):
        adapt(model, r=3, target_modules=["0", "1"])
    assert [a is b for a, b in zip(model, layers, strict=True)] == [True, True]


@pytest.mark.parametrize("place", ["_initialise", "settle_fast_paths", "let_gradients_in"])
def test_an_interrupt_half_way_leaves_the_model_as_it_was(monkeypatch, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    layers = list(model)
    monkeypatch.setattr(f"lora_core.adapt.inject.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt(model, target_modules=["0", "1"])
    assert [a is b for a, b in zip(model, layers, strict=True)] == [True, True]


def test_injection_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = TinyDecoder(vocabulary=32000, width=4096)
    adapt(model, r=16)
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.zeros(1, 2, dtype=torch.long, device="meta")).shape == (1, 2, 32000)


def test_gradients_equal_those_of_the_summed_weight():
    """dL/dA and dL/dB through the layer are those through W + s B A, by the chain rule in float64."""
    model = adapt(TinyDecoder().double(), target_modules=["q_proj"])
    randomise(model)
    model(tokens()).square().sum().backward()
    layer = model.layers[0].attn.q_proj
    plain = copy.deepcopy(model)
    q = plain.layers[0].attn.q_proj
    a = q.lora_a["default"].detach().requires_grad_()
    b = q.lora_b["default"].detach().requires_grad_()
    whole = q.base_layer.weight + q.adapters["default"].scaling * (b @ a)
    plain.layers[0].attn.q_proj = nn.Linear(24, 24, bias=False)
    torch.func.functional_call(plain, {"layers.0.attn.q_proj.weight": whole}, (tokens(),)).square().sum().backward()
    from tolerance import assert_within_rounding

    for got, want in ((layer.lora_a["default"].grad, a.grad), (layer.lora_b["default"].grad, b.grad)):
        assert_within_rounding(got.float(), lambda g: g, want, depth=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_adapters_under_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = adapt(TinyDecoder())
    randomise(model)

    def run(recompute):
        x = model.embed_tokens(tokens())
        for layer in model.layers:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant) if recompute else layer(x)
        model.zero_grad()
        model.lm_head(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = run(False), run(True)
    assert all(plain[n].any() for n in plain)
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_encoder_layer_in_eval_mode_does_not_skip_its_adapters():
    """PyTorch's inference path of nn.TransformerEncoderLayer reads the weights of its linear layers directly."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        adapt(model, target_modules=["linear1", "linear2"])
        randomise(model)
        assert not torch.equal(model.eval()(x), before)
        lc.delete_adapter(model, "default")
        assert torch.equal(model(x), before)


def test_print_trainable_parameters_counts_like_the_formula(capsys):
    model = adapt(r=2)
    per_block = 2 * (24 + 24) * 2 + 2 * (24 + 48) * 2
    whole = sum(p.numel() for p in TinyDecoder().parameters()) + 3 * per_block
    lc.print_trainable_parameters(model)
    share = 100 * 3 * per_block / whole
    assert (
        capsys.readouterr().out
        == f"trainable params: {3 * per_block:,} || all params: {whole:,} || trainable%: {share:.4f}\n"
    )


def test_counting_sees_the_weights_behind_a_quantised_layer():
    model = TinyDecoder()
    _, before = count_parameters(model)
    lc.quantize_model(model)
    assert count_parameters(model)[1] == before


def test_injection_keeps_the_mode_of_every_module():
    model = TinyDecoder().train()
    model.layers[1].eval()
    before = {n: m.training for n, m in model.named_modules()}
    adapt(model, modules_to_save=["norm"])
    after = {n.replace(".base_layer", "").replace(".original", ""): m.training for n, m in model.named_modules()}
    assert all(after[n] == mode for n, mode in before.items())


def test_modules_to_save_around_another_adapters_layer_are_refused():
    model = adapt(name="one", target_modules=["q_proj"])
    with pytest.raises(lc.ConfigError, match="layers.0.attn, where an adapter has a layer"):
        adapt(model, name="two", target_modules=["up_proj"], modules_to_save=["layers.0.attn"])


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], {"a": nn.Linear(2, 2)}, "model"], ids=str)
@pytest.mark.parametrize(
    "verb",
    [
        *(lc.quantize_model, lc.merge_adapter, lc.unmerge_adapter, lc.merge_and_unload, lc.fuse, lc.unfuse),
        lambda model: lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"])),
        lambda model: lc.set_adapter(model, "default"),
        lambda model: lc.delete_adapter(model, "default"),
        lambda model: lc.disable_adapter(model).__enter__(),
        lc.print_trainable_parameters,
    ],
)
def test_what_is_no_module_is_refused(verb, model):
    with pytest.raises(lc.ConfigError, match=f"model is a {type(model).__name__}; want a torch.nn.Module"):
        verb(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_what_is_inserted_is_in_the_mode_of_the_model(training, quantised):
    model = TinyDecoder().train(training)
    if quantised:
        lc.quantize_model(model)
    for name, start in (("one", True), ("two", "pissa")):
        config = lc.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=start)
        with warnings.catch_warnings():
            # of a start from four bits
            warnings.simplefilter("ignore")
            lc.add_adapter(model, config, name)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("name", ["keys", "items", "pop", "forward", "training"])
def test_adapter_names_that_pytorch_uses_itself_are_refused(name):
    with pytest.raises(lc.AdapterError, match=f"'{name}' is an attribute"):
        adapt(name=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "q_proj"}, r"regular expression for whole names; write \['q_proj'\]"),
        ({"layers_to_transform": [99]}, "leave nothing of what target_modules matches; the layers here are 0 to 2"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "these limits leave nothing"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["attn"]},
            r"with modules_to_save=\['attn'\]: these limits leave nothing",
        ),
    ],
    ids=str,
)
def test_message_says_why_nothing_was_found(config, message):
    with pytest.raises(lc.TargetNotFoundError, match=message):
        adapt(**config)


def test_layer_without_a_shape_yet_is_refused():
    with pytest.raises(lc.ConfigError, match="LazyLinear without a shape yet: run the model once first"):
        adapt(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), target_modules=["0"])


def test_modules_to_save_means_every_name_that_ends_so():
    """As in PEFT, where "norm" means input_layernorm too."""
    model = adapt(target_modules=["q_proj"], modules_to_save=["orm"])
    assert isinstance(model.norm, TrainableCopy)


class Gated(nn.Linear):
    """A linear layer with another inside."""

    def __init__(self, width):
        super().__init__(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x):
        return super().forward(x) * self.gate(x)


def test_layer_inside_a_chosen_layer_is_left_out_and_told_of():
    model, x = nn.Sequential(nn.Linear(4, 4), Gated(4)), torch.randn(3, 4)
    wanted = model(x)
    with pytest.warns(UserWarning, match="left out: 1.gate, inside a layer that is adapted itself") as caught:
        adapt(model, target_modules="all-linear")
    assert caught[0].filename == __file__
    assert list(adapter_layers(model)) == ["0", "1"] and torch.equal(model(x), wanted)


@pytest.mark.parametrize("verb", [lambda model: adapt(model, target_modules=["0"]), lc.quantize_model])
def test_model_with_a_layer_without_a_shape_yet_is_refused_and_stays_as_it_was(verb):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(lc.ConfigError, match="1 is a LazyLinear without a shape yet: run the model once first"):
        verb(model)
    assert [type(module) for module in model.modules()] == kinds


def test_print_trainable_parameters_of_a_module_without_any(capsys):
    lc.print_trainable_parameters(nn.GELU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
