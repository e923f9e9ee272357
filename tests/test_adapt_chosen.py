"""Which modules a configuration chooses, to adapt and to train whole, and what it is told of the rest."""

import copy
import sys
import warnings

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers, trainable_copies
from lora_core.layers.adapter import AdapterLayer


def adapt(model, **config):
    return lc.add_adapter(model, lc.LoraConfig(**{"r": 2, **config}))


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


class Classifier(nn.Module):
    """A body and a head of two layers, as RoBERTa's."""

    def __init__(self, head="classifier"):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.add_module(head, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize(
    ("task", "head"),
    [("SEQ_CLS", "classifier"), ("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")],
)
def test_head_of_a_task_is_trained_whole_and_saved(task, head, tmp_path):
    model = adapt(Classifier(head), target_modules="all-linear", task_type=task)
    assert list(adapter_layers(model)) == ["body.0", "body.1"]
    assert list(trainable_copies(model)) == [head]
    assert any(name.startswith(f"{head}.copies.default") for name in trained(model))
    randomise(model)
    lc.save_adapter(model, tmp_path)
    other = Classifier(head)
    other.load_state_dict(lc.merge_and_unload(model).state_dict())
    assert lc.load_adapter(other, tmp_path) is other


def test_head_is_left_alone_where_the_task_is_another_or_the_model_has_none():
    assert not trainable_copies(adapt(Classifier(), target_modules=["0"], task_type="CAUSAL_LM"))
    assert not trainable_copies(adapt(Classifier("top"), target_modules=["0"], task_type="SEQ_CLS"))


def test_what_is_trained_whole_is_not_adapted_too():
    """modules_to_save means every name that ends so, without a dot before it, and all inside."""
    model = adapt(TinyDecoder(), target_modules=["lm_head", "q_proj"], modules_to_save=["head"])
    assert list(trainable_copies(model)) == ["lm_head"]
    assert list(adapter_layers(model)) == [f"layers.{i}.attn.q_proj" for i in range(3)]


def test_container_is_not_trained_whole():
    with pytest.raises(lc.ConfigError, match="layers, a ModuleList, which is never called itself"):
        adapt(TinyDecoder(), target_modules=["lm_head"], modules_to_save=["layers"])


def test_quantised_module_is_not_trained_whole():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), skip_modules=[])
    with pytest.raises(lc.ConfigError, match="modules_to_save names 1, which is quantised"):
        adapt(model, target_modules=["0"], modules_to_save=["1"])
    assert not adapter_layers(model)


@pytest.mark.peer("bitsandbytes")
def test_module_that_bitsandbytes_quantised_is_not_trained_whole():
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64)).to("cpu")
    with pytest.raises(lc.ConfigError, match="modules_to_save names 1, which is quantised"):
        adapt(model, target_modules=["0"], modules_to_save=["1"])
    assert not adapter_layers(model)


def test_failing_start_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = torch.inf
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lc.NonFiniteError):
        adapt(model, target_modules=["0", "1"], init_lora_weights="olora")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_model_is_adapted_by_the_names_inside(wrap, tmp_path):
    plain = TinyDecoder()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    config = {"target_modules": r"layers\.\d\.attn\.q_proj", "rank_pattern": {r"^layers\.0\.attn\.q_proj": 3}}
    model = adapt(wrap(plain), **config)
    assert [layer.adapters["default"].rank for layer in adapter_layers(plain).values()] == [3, 2, 2]
    randomise(plain)
    lc.save_adapter(model, tmp_path)
    other = TinyDecoder()
    other.load_state_dict(state)
    assert torch.equal(lc.load_adapter(other, tmp_path)(tokens()), plain(tokens()))


def test_part_that_is_compiled_is_adapted_by_its_plain_name(tmp_path):
    model = TinyDecoder()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    adapt(model, target_modules=["layers.0.attn.q_proj"], rank_pattern={r"^layers\.0\.attn\.q_proj": 3})
    (layer,) = adapter_layers(model).values()
    assert layer.adapters["default"].rank == 3
    lc.save_adapter(model, tmp_path)
    lc.load_adapter(TinyDecoder(), tmp_path)


@pytest.mark.peer("peft")
@pytest.mark.parametrize(
    ("targets", "layers", "pattern"),
    [
        (["model.layers.0.self_attn.q_proj", "v_proj"], [1], None),
        (["q_proj"], [1], None),
        (["q_proj"], 0, "layers"),
        (["w1"], [1], None),
        (["w1"], [1], ["layers"]),
    ],
)
def test_layers_to_transform_choose_what_peft_chooses(targets, layers, pattern):
    import peft

    def block():
        return nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q_proj", "v_proj")}),
                "experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3)),
            }
        )

    def build(where):
        layers = nn.ModuleList(block() for _ in range(2))
        return (
            nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})}) if where else nn.ModuleDict({"layers": layers})
        )

    for where in ("model", ""):
        fields = {"r": 2, "target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
        try:
            theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), build(where))
            wanted = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
        except ValueError:
            wanted = set()
        if not wanted:
            # a list of layers that is the model's own child has no number for PEFT
            continue
        assert set(adapter_layers(lc.add_adapter(build(where), lc.LoraConfig(**fields)))) == wanted


def test_stacked_experts_that_all_linear_leaves_out_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))
            # no stack
            self.mix_fc = nn.Parameter(torch.randn(1, 1, 8))

    model = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(8, 8)})
    for wanted in ("all-linear", ["fc", "up_proj"], ["fc", "experts.gate_up_proj"]):
        with pytest.warns(UserWarning, match=r"target_modules leaves stacked weights out.*experts\.gate_up_proj"):
            adapt(copy.deepcopy(model), target_modules=wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, target_modules=["fc"])


def test_a_classifier_as_large_as_a_small_table_is_no_output_head():
    """As BERT's of two classes beside its table of two token types."""

    class Classifier(nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.words, self.types, self.others = (nn.Embedding(n, 8) for n in (50, 2, 20))
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, answers)

    # the last of the shape of the smaller table, as of the positions of a model of letters
    for answers, adapted in ((2, True), (50, False), (20, False)):
        model = adapt(Classifier(answers), target_modules="all-linear")
        assert isinstance(model.head, AdapterLayer) == adapted


@pytest.mark.peer("transformers", "peft")
def test_all_linear_reaches_a_classifier_of_two_classes_as_pefts():
    import peft
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=48))
    found = adapt(copy.deepcopy(model), target_modules="all-linear")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert adapter_layers(found).keys() == set(theirs.base_model.targeted_module_names)


def test_a_convolution_with_a_forward_of_its_own_is_refused():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))

    class Delegating(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)

    class CausalInTwoSteps(nn.Conv1d):
        def forward(self, x):
            x = nn.functional.pad(x, (self.kernel_size[0] - 1, 0))
            return super().forward(x)

    class Gated(nn.Conv1d):
        def forward(self, x, gate):
            return super().forward(x) * gate

    assert adapt(nn.Sequential(Delegating(4, 4, 3)), target_modules=["0"])(torch.randn(1, 4, 9)).shape == (1, 4, 7)
    for kind in (Causal, CausalInTwoSteps, Gated):
        with pytest.raises(lc.ConfigError, match=f"0 is a {kind.__name__}, whose forward is not that of the conv"):
            adapt(nn.Sequential(kind(4, 4, 3)), target_modules=["0"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern: no adapted module matches 'k_proj'"),
        ({"alpha_pattern": {"^q_proj": 4}}, r"alpha_pattern: no adapted module matches '\^q_proj'"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules: no module is called 'k_proj'"),
    ],
)
def test_entries_that_choose_nothing_are_warned_of(config, message):
    with pytest.warns(UserWarning, match=message):
        adapt(TinyDecoder(), target_modules=["q_proj"], **config)


def test_names_in_any_collection_can_be_saved(tmp_path):
    model = adapt(TinyDecoder(), target_modules={"q_proj": 1, "v_proj": 2}.keys())
    lc.save_adapter(model, tmp_path)
    lc.load_adapter(TinyDecoder(), tmp_path)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("by_transformers", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel], ids=["", "compile", "parallel"])
def test_gradients_are_let_in_once_and_kept_out_again(by_transformers, wrap):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **size))
    model.gradient_checkpointing_enable()
    if not by_transformers:
        model.disable_input_require_grads()
    embedding = model.get_input_embeddings()
    before = len(embedding._forward_hooks)
    model = wrap(model)
    for name in ("a", "b", "c"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj"]), name)
    assert len(embedding._forward_hooks) == 1
    for name in ("a", "b"):
        lc.delete_adapter(model, name)
        assert len(embedding._forward_hooks) == 1
    lc.delete_adapter(model, "c")
    assert len(embedding._forward_hooks) == before


def test_nothing_is_warned_of_without_need(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(
            TinyDecoder(), target_modules="all-linear", rank_pattern={"q_proj": 3}, exclude_modules=["up_proj"]
        )
        lc.save_adapter(model, tmp_path)
        lc.load_adapter(TinyDecoder(), tmp_path)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (["classifier.0"], ["classifier"], "names classifier, where an adapter has a layer or a module of its own"),
        (["classifier"], ["classifier.0"], "names classifier.0, and adapter 'a' trains classifier whole"),
    ],
    ids=["around", "inside"],
)
def test_two_adapters_do_not_train_one_module_inside_the_others(first, then, message):
    model = Classifier()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body.0"], modules_to_save=first), "a")
    with pytest.raises(lc.ConfigError, match=message):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body.0"], modules_to_save=then), "b")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body.0"], modules_to_save=first), "b")
    assert list(trainable_copies(model)[first[0]].copies) == ["a", "b"]


def test_what_lies_inside_a_module_that_is_trained_whole_is_told_of_where_the_adapter_is_added():
    with pytest.warns(UserWarning, match="'classifier.0' lies inside modules that are trained whole") as caught:
        model = adapt(Classifier(), target_modules=["body.0"], modules_to_save=["classifier", "classifier.0"])
    assert caught[0].filename == __file__ and list(trainable_copies(model)) == ["classifier"]


def test_what_is_trained_whole_is_none_of_an_adapters_own_parts():
    """An adapted layer holds a "base_layer", which ends as "last_layer" does."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "last_layer": nn.Linear(4, 4)})
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body"]), "a")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body"], modules_to_save=["layer"]), "b")
    assert list(trainable_copies(model)) == ["last_layer"]


def calls(verb, size):
    """Count the Python calls that a verb makes on a model of this many linear layers."""
    model, found = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(32, 32) for _ in range(size))}), [0]
    if verb is lc.fuse:
        adapt(model, target_modules="all-linear")

    def count(frame, event, argument):
        found[0] += event == "call"

    sys.setprofile(count)
    try:
        verb(model)
    finally:
        sys.setprofile(None)
    return found[0]


def adapt_by_names(model):
    adapt(model, target_modules=[f"layers.{i}" for i in range(len(model["layers"]))])


@pytest.mark.parametrize("verb", [lc.fuse, lc.quantize_model, adapt_by_names])
def test_work_grows_with_the_number_of_layers_and_no_faster(verb):
    """A mixture of experts has tens of thousands of linear layers."""
    calls(verb, 2)
    few, many = calls(verb, 40), calls(verb, 160)
    assert many < 5 * few


def test_layers_whose_names_begin_alike_are_each_adapted():
    """fc2 is not inside fc, as fc.2 would be."""
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
    assert list(adapter_layers(adapt(model, target_modules=["fc", "fc2"]))) == ["fc", "fc2"]
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "head": nn.Linear(8, 8), "head2": nn.Linear(8, 8)})
    adapt(model, target_modules=["fc"], modules_to_save=["head", "head2"])
    assert list(trainable_copies(model)) == ["head", "head2"]


def test_all_linear_chooses_the_same_for_a_second_adapter():
    model = adapt(TinyDecoder(), target_modules=["embed_tokens"])
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"), "second")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"), "third")
    found = {name: list(layer.adapters) for name, layer in adapter_layers(model).items()}
    assert found.pop("embed_tokens") == ["default"] and found
    assert all(names == ["second", "third"] for names in found.values())


def test_layers_that_are_numbered_with_gaps_are_listed():
    layers = nn.ModuleDict({str(i): nn.ModuleDict({"fc": nn.Linear(8, 8)}) for i in (0, 2, 3)})
    with pytest.raises(lc.TargetNotFoundError, match="the layers here are 0, 2, 3; widen them"):
        adapt(nn.ModuleDict({"layers": layers}), target_modules=["fc"], layers_to_transform=[1])


def test_trained_module_tied_to_one_whose_name_begins_alike_is_told_of():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "head": nn.Linear(8, 8), "head2": nn.Linear(8, 8)})
    model["head2"].weight = model["head"].weight
    with pytest.warns(UserWarning, match="head.weight is tied to head2.weight; the trained copy is not"):
        adapt(model, target_modules=["fc"], modules_to_save=["head"])


def test_an_empty_list_of_layers_limits_nothing():
    found = (adapt(TinyDecoder(), target_modules=["q_proj"], layers_to_transform=chosen) for chosen in ([], None))
    assert len({tuple(adapter_layers(model)) for model in found}) == 1


def test_adapters_that_train_one_module_whole_may_name_it_as_a_module_inside_ends():
    """modules_to_save takes every name that ends so: the second adapter has a copy of the whole one too."""
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "proj": nn.Module()})
    model["proj"].out_proj = nn.Linear(8, 8)
    for name in ("first", "second"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["body"], modules_to_save=["proj"]), name)
    assert list(trainable_copies(model)["proj"].copies) == ["first", "second"]


def test_module_with_complex_parameters_can_be_trained_whole():
    model = nn.Sequential(nn.Linear(8, 8), nn.Module())
    model[1].filter = nn.Parameter(torch.ones(8, dtype=torch.complex64))
    adapt(model, target_modules=["0"], modules_to_save=["1"])
    assert "1.copies.default.filter" in trained(model)


class Router(nn.Linear):
    """Chooses experts, as Llama 4's and PhiMoE's do."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


def test_layers_that_return_several_results_are_left_out_of_all_linear_and_refused_by_name():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "router": Router(8, 4)})
    with pytest.warns(UserWarning, match="'all-linear' leaves out router: the forward returns several results"):
        adapt(model, target_modules="all-linear")
    assert list(adapter_layers(model)) == ["fc"]
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "router": Router(8, 4)})
    with pytest.raises(lc.ConfigError, match="router is a Router, whose forward returns several results"):
        adapt(model, target_modules=["fc", "router"])
    assert not adapter_layers(model)


def test_weights_that_are_computed_are_no_stacked_experts():
    """As those of the weight-normed convolution that gives speech models their positions."""
    model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, target_modules="all-linear")
