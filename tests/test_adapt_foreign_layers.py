"""Layers that are more than their class: hooks, forwards of their own, computed weights, shared memory."""

import copy
import warnings

import pytest
import torch
from models import randomise
from tolerance import assert_same_function
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import lora_core as lc
from lora_core.adapt.walk import Ties
from lora_core.layers.nf4_linear import NF4Linear


class Scaled(nn.Linear):
    """Uses its weight seven times over."""

    def forward(self, x):
        return 7 * super().forward(x)


class Traced(nn.Linear):
    """Has a forward of its own that computes what nn.Linear does."""

    def forward(self, x):
        return super().forward(x)


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, tokens):
        return super().forward(tokens) * self.embed_scale


class Positions(nn.Embedding):
    """Looks up other rows than it is given, as OPT's learned positions do."""

    def forward(self, mask):
        return super().forward(mask.cumsum(1))


def adapted(layer, **config):
    model = nn.Sequential(layer).double()
    lc.add_adapter(model, lc.LoraConfig(**{"r": 2, "target_modules": ["0"], **config}))
    randomise(model)
    return model


def doubled(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def counted(layer):
    layer.register_forward_hook(lambda module, args, y: None)
    return layer


def patched(layer):
    """As accelerate's hooks patch a forward: the same function, found on the layer itself."""
    forward = layer.forward
    layer.forward = lambda *args: forward(*args)
    return layer


X, TOKENS = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(5)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: Scaled(16, 16), X),
        (lambda: doubled(nn.Linear(16, 16)), X),
        (lambda: doubled(nn.Embedding(9, 16)), TOKENS),
        (lambda: doubled(nn.Conv1d(3, 4, 3)), torch.randn(2, 3, 8, dtype=torch.float64)),
    ],
    ids=["subclass", "hook", "embedding", "convolution"],
)
@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_merging_into_a_layer_that_uses_its_weight_otherwise_is_refused(make, x, verb):
    model = adapted(make())
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lc.AdapterError, match="uses the weight in another way"):
        verb(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: Traced(16, 16), X),
        (lambda: counted(nn.Linear(16, 16)), X),
        (lambda: patched(nn.Linear(16, 16)), X),
        (lambda: ScaledEmbedding(9, 16), TOKENS),
        (lambda: counted(nn.Conv1d(3, 4, 3, stride=2, dilation=2)), torch.randn(2, 3, 9, dtype=torch.float64)),
        (lambda: counted(nn.Conv2d(3, 4, (3, 1), padding=1)), torch.randn(2, 3, 8, 8, dtype=torch.float64)),
    ],
    ids=["subclass", "hook", "patch", "embedding", "convolution", "two dimensions"],
)
def test_merging_into_a_layer_that_adds_nothing_of_its_own_works(make, x):
    model = adapted(make())
    wanted, rng = model(x), torch.get_rng_state()
    lc.merge_adapter(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_function(model(x), wanted)
    lc.unmerge_adapter(model)
    assert torch.equal(model(x), wanted)


def test_merging_into_a_layer_that_cannot_be_tried_is_refused():
    class Picky(nn.Linear):
        def forward(self, x, gate):
            return super().forward(x) * gate

    model = adapted(Picky(16, 16))
    with pytest.raises(lc.AdapterError, match="could not be tried.*missing 1 required positional argument"):
        lc.merge_adapter(model)


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, AttributeError])
def test_merging_into_a_layer_that_fails_when_it_is_tried_is_refused_and_changes_nothing(error):
    class Failing(nn.Linear):
        def forward(self, x):
            raise error("not these rows")

    model = adapted(Failing(16, 16))
    before = model[0].weight.detach().clone()
    with pytest.raises(lc.AdapterError, match=f"could not be tried.*{error.__name__}: not these rows"):
        lc.merge_adapter(model)
    assert torch.equal(model[0].weight, before) and model[0].merged is None


def pruned():
    layer = nn.Linear(16, 16)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
        lambda: parametrizations.spectral_norm(nn.Linear(16, 16)),
        pruned,
    ],
    ids=["weight norm", "spectral norm", "pruned"],
)
def test_layers_whose_weight_is_computed_are_neither_merged_nor_split_nor_quantised(make):
    def model(**config):
        return lc.add_adapter(nn.ModuleDict({"fc": make()}), lc.LoraConfig(r=2, target_modules=["fc"], **config))

    x, adapted = torch.randn(4, 16), model().eval()
    randomise(adapted)
    before = adapted["fc"](x)
    for verb in (lc.merge_adapter, lc.merge_and_unload):
        with pytest.raises(lc.AdapterError, match="its weight is computed from other tensors"):
            verb(adapted)
    assert torch.equal(adapted["fc"](x), before)
    with pytest.raises(lc.ConfigError, match="computed from other tensors"):
        model(init_lora_weights="pissa")
    plain = nn.ModuleDict({"fc": make(), "other": nn.Linear(16, 16)})
    with pytest.warns(UserWarning, match="leaves fc in full precision"):
        lc.quantize_model(plain, skip_modules=[])
    assert isinstance(plain["other"], NF4Linear) and not isinstance(plain["fc"], NF4Linear)


@pytest.mark.parametrize("make", [lambda: Scaled(64, 64), lambda: doubled(nn.Linear(64, 64))], ids=["forward", "hook"])
def test_quantising_leaves_layers_that_do_more_alone(make):
    model = nn.Sequential(make(), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="leaves 0 in full precision: a forward, hooks"):
        lc.quantize_model(model, skip_modules=[])
    assert isinstance(model[1], NF4Linear) and not isinstance(model[0], NF4Linear)


def test_embedding_that_looks_up_otherwise_is_refused():
    model = nn.ModuleDict({"positions": Positions(9, 16), "tokens": ScaledEmbedding(9, 16)})
    with pytest.raises(lc.ConfigError, match="positions is a Positions, whose forward looks up other rows"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["positions"]))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["tokens"]))


@pytest.mark.peer("transformers")
def test_transposed_layer_of_another_forward_is_called_as_it_is():
    from transformers.pytorch_utils import Conv1D

    class Doubled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(Doubled(8, 16)).double()
    model = lc.add_adapter(copy.deepcopy(base), lc.LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(X), base(X))


def test_weights_over_the_same_memory_are_tied():
    """Two parameters, one memory: as detached or loaded twice from one buffer."""
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    model[2].weight = nn.Parameter(model[0].weight.data)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(lc.AdapterError, match=r"its weight is tied to 2\.weight"):
        lc.merge_adapter(model)
    lc.delete_adapter(model, "default")
    with pytest.raises(lc.ConfigError, match=r"tied to 2\.weight"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))


def test_parameters_one_behind_the_other_in_a_buffer_are_not_tied():
    """As an optimiser's or a loader's flat buffer holds them."""
    flat = torch.randn(2, 16, 16)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    for layer, weight in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    lc.merge_adapter(model)


def test_parameters_that_wrap_other_tensors_are_not_tied():
    """Sharded and quantised parameters of other libraries: the wrapper's own address is 0."""

    class Wrapping(torch.Tensor):
        @staticmethod
        def __new__(cls, held):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

        def __init__(self, held):
            self.held = held

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return cls(func(*(a.held if isinstance(a, cls) else a for a in args), **(kwargs or {})))

    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(Wrapping(layer.weight.data), requires_grad=False)
    assert model[0].weight.data_ptr() == 0
    assert Ties(model).of(model[0].weight) == []
    model[1].weight = model[0].weight
    assert Ties(model).of(model[0].weight) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weight_of_a_dtype_that_cannot_be_adapted_is_refused(dtype):
    model = nn.Sequential(nn.Linear(16, 16).to(dtype))
    with pytest.raises(lc.DtypeError, match=f"0 has a weight of {dtype}; want one of torch.float32"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_start_from_a_weight_that_is_not_finite_is_refused(start):
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data[3, 4] = torch.nan
    with pytest.raises(lc.NonFiniteError, match="0: .*holds NaN or infinity.*the model is unchanged"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
    assert type(model[0]) is nn.Linear


def test_adapted_layers_show_what_their_base_layer_is():
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(4, 6, 3, stride=2, padding=1), "table": nn.Embedding(9, 16, padding_idx=2)}
    )
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["conv", "table"]))
    assert (model["conv"].stride, model["conv"].kernel_size, model["conv"].in_channels) == ((2, 2), (3, 3), 4)
    assert (model["table"].padding_idx, model["table"].num_embeddings, model["table"].embedding_dim) == (2, 9, 16)


def test_trained_copies_show_what_runs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert model[1].out_features == 3 and model[1].weight is model[1].copies["default"].weight
    with pytest.raises(AttributeError, match="no attribute 'padding_idx'"):
        _ = model[1].padding_idx


MASK = torch.tensor([[False, False, False, True], [False, False, True, True]])


@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.linear2"]], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_encoder_with_padding_runs_its_adapters_in_eval_mode(targets, quantised):
    """PyTorch's own inference paths read weights past the layers' forward, and make nested tensors of padded input."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 3).eval()
    flags = [encoder.use_nested_tensor, *(inner.activation_relu_or_gelu for inner in encoder.layers)]
    x = torch.randn(2, 4, 16)
    if quantised:
        lc.quantize_model(encoder, skip_modules=[])
    lc.add_adapter(encoder, lc.LoraConfig(r=2, target_modules=targets))
    randomise(encoder)
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=MASK)[~MASK]
    wanted = encoder(x, src_key_padding_mask=MASK)[~MASK].detach()
    # attention is computed by other kernels with and without gradients
    assert torch.equal(got.isfinite(), wanted.isfinite()) and (got - wanted).norm() < wanted.norm() / 1000
    lc.merge_and_unload(encoder)
    with torch.no_grad():
        encoder(x, src_key_padding_mask=MASK)
    if not quantised:
        assert [encoder.use_nested_tensor, *(inner.activation_relu_or_gelu for inner in encoder.layers)] == flags


@pytest.mark.parametrize(("computed", "given"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_half_precision_matrices_run_in_the_compute_dtype_of_a_quantised_layer(computed, given):
    model = nn.Sequential(nn.Linear(64, 64))
    lc.quantize_model(model, lc.NF4Config(compute_dtype=getattr(torch, computed)), skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    model.to(getattr(torch, given))
    x = torch.randn(3, 64, dtype=getattr(torch, given))
    y = model(x)
    y.float().sum().backward()
    assert y.dtype == x.dtype and model[0].lora_b["default"].grad.abs().sum() > 0


def test_encoder_runs_a_trained_copy_of_its_attention_in_eval_mode():
    """PyTorch's encoder layer asks its attention for an attribute that has an underscore before its name."""
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 4, 16)
    wanted = encoder(x)
    lc.add_adapter(encoder, lc.LoraConfig(r=2, target_modules=["linear1"], modules_to_save=["self_attn"]))
    assert torch.equal(encoder(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging_an_update_within_the_rounding_of_the_output_is_not_refused(dtype):
    """The two outputs that are compared are rounded, by more than the update changes them."""
    model = nn.Sequential(counted(nn.Linear(64, 64))).to(dtype)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    randomise(model, 1e-2)
    lc.merge_adapter(model)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("kind", ["transposed", "4-bit", "4-bit that computes in another dtype"])
def test_merging_tries_layers_of_every_kind_that_have_hooks(kind):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(48, 64) if kind == "transposed" else nn.Linear(64, 48))
    if kind != "transposed":
        compute = torch.bfloat16 if "other" in kind else None
        lc.quantize_model(model, lc.NF4Config(compute_dtype=compute), skip_modules=[])
    counted(model[0])
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    randomise(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lc.merge_adapter(model)
    lc.unmerge_adapter(model)
    doubled(model[0].base_layer)
    with pytest.raises(lc.AdapterError, match="uses the weight in another way"):
        lc.merge_adapter(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_parameters_without_an_address_are_not_tied():
    """A sparse one has no memory that could be another's, and a faked one is not asked, which PyTorch warns of."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.data.to_sparse())
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        faked = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        assert Ties(faked).of(faked[0].weight) == []
    assert Ties(model).of(model[0].weight) == []
    model[1].weight = model[0].weight
    assert Ties(model).of(model[0].weight) == ["0.weight", "1.weight"]


def test_trained_copies_keep_what_belongs_to_the_running_module():
    """accelerate, which looks for its hook, must not find that of the module inside a second time."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model[1].copies["default"]._hf_hook = model[1].copies["default"].mark = "its own"
    assert not hasattr(model[1], "_hf_hook") and model[1].mark == "its own"
