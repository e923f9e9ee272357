"""Adapted layers of which others have changed a part: weights that wrap tensors, matrices that are pruned or computed,
dtypes converted one by one, and inputs of rows of different lengths."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from tolerance import assert_same_function
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

import lora_core as lc


class OfItsOwn(torch.Tensor):
    """A weight that knows one thing, to be multiplied by, as those that torchao has quantised do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, meta, size, stride):
        return cls(tensors["inner"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.inner, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].inner.detach())
        raise NotImplementedError(f"{function} of {cls.__name__}")


def linear(k=12, n=10):
    return nn.Linear(k, n, dtype=torch.float64)


def of_its_own(dtype=torch.float64):
    """A model one of whose weights wraps a tensor, and the same with a plain weight."""
    plain = nn.Sequential(linear(), nn.Tanh(), linear(10, 4)).requires_grad_(False).to(dtype)
    model = copy.deepcopy(plain)
    model[0].weight = nn.Parameter(OfItsOwn(plain[0].weight.detach().clone()), requires_grad=False)
    return model, plain


@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
def test_weight_that_wraps_another_is_multiplied_by_its_own_forward(tmp_path, fused):
    model, plain = of_its_own()
    for each in (model, plain):
        lc.add_adapter(each, lc.LoraConfig(r=3, target_modules="all-linear"))
    randomise(plain)
    lc.save_adapter(plain, tmp_path)
    lc.delete_adapter(model, "default")
    lc.load_adapter(model, tmp_path, is_trainable=True)
    if fused:
        lc.fuse(model)
    x = torch.randn(5, 12, dtype=torch.float64)
    for each in (model, plain):
        each(x).square().sum().backward()
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    given = dict(model.named_parameters())
    for name, parameter in trained.items():
        assert_same_function(given[name].grad, parameter.grad)


def test_weight_that_wraps_another_is_neither_merged_split_nor_quantised():
    model, _ = of_its_own()
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]))
    with pytest.raises(lc.AdapterError, match="its weight is a OfItsOwn, which holds its values in a form of its own"):
        lc.merge_adapter(model)
    model, _ = of_its_own()
    with pytest.raises(lc.ConfigError, match="its weight is a OfItsOwn"):
        lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"], init_lora_weights="olora"))
    model, _ = of_its_own(torch.float32)
    lc.quantize_model(model, skip_modules=[])
    assert type(model[0]) is nn.Linear and type(model[2]).__name__ == "NF4Linear"


def pruned(matrices, name):
    prune.random_unstructured(matrices, name, 0.5)
    return matrices._parameters[f"{name}_orig"]


def normed(matrices, name):
    weight_norm(matrices, name)
    return matrices._parameters[f"{name}_v"]


class Doubled(nn.Module):
    def forward(self, matrix):
        return 2 * matrix


def computed(matrices, name):
    parametrize.register_parametrization(matrices, name, Doubled())
    return matrices.parametrizations[name].original


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("change", [pruned, normed, computed])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_matrix_that_is_computed_is_trained_switched_merged_saved_and_deleted(tmp_path, change, quantised):
    model = nn.Sequential(nn.Linear(12, 10))
    if quantised:
        lc.quantize_model(model, skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]))
    randomise(model.double())
    layer, x = model[0], torch.randn(5, 12, dtype=torch.float64)
    held = change(layer.lora_a, "default")
    dense = layer.read_weight() if quantised else layer.weight

    def written():
        matrix = layer.lora_a("default")
        scaling = layer.adapters["default"].scaling
        return x @ dense.double().T + layer.bias + scaling * (x @ matrix.T) @ layer.lora_b["default"].T

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        # a step moves what is held, and the next forward follows
        wanted = torch.autograd.grad(written().square().sum(), held)[0]
        y = model(x)
        assert_same_function(y, written())
        optimizer.zero_grad()
        y.square().sum().backward()
        assert_same_function(held.grad, wanted)
        optimizer.step()
    trained = written().detach()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), "other")
    assert not held.requires_grad
    lc.set_adapter(model, "default")
    assert held.requires_grad
    assert_same_function(model(x).detach(), trained)
    if not quantised:
        lc.merge_adapter(model)
        assert not held.requires_grad
        assert_same_function(model.eval()(x).detach(), trained)
        lc.unmerge_adapter(model)
        assert held.requires_grad
    lc.save_adapter(model, tmp_path)
    lc.delete_adapter(model, "default")
    assert list(layer.lora_a) == ["other"] and not layer.lora_a._forward_pre_hooks
    assert not any(name.startswith("0.lora_a.default") for name, _ in model.named_parameters())
    lc.load_adapter(model, tmp_path)
    # over a base in 4 bits they are float32 again, rounded
    assert_same_function(model.double()(x).detach(), written() if quantised else trained)


def test_adapters_are_called_as_pruning_calls_what_it_holds():
    """A name that ends so is a name."""
    model = nn.Sequential(nn.Linear(12, 10))
    for name in ("task_v", "task_orig", "task"):
        lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]), name)
    for name in ("task_v", "task_orig", "task"):
        lc.set_adapter(model, name)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained == [f"0.lora_a.{name}", f"0.lora_b.{name}"]


def test_hooks_on_every_module_see_what_the_modules_of_a_model_are_given():
    model = lc.add_adapter(nn.Sequential(nn.Linear(12, 10)), lc.LoraConfig(r=3, target_modules=["0"]))
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    model(torch.randn(2, 12))
    assert seen == [torch.Size([2, 12])] * 3


def test_matrices_of_two_dtypes_run_in_float32():
    model = lc.add_adapter(nn.Sequential(nn.Linear(12, 10).bfloat16()), lc.LoraConfig(r=3, target_modules=["0"]))
    randomise(model)
    model[0].lora_a.bfloat16()
    same = copy.deepcopy(model)
    same[0].lora_a.float()
    x = torch.randn(4, 12).bfloat16()
    assert torch.equal(model(x), same(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_of_another_dtype_than_the_base_run_in_float32(base, dtype):
    model = lc.add_adapter(nn.Sequential(nn.Linear(12, 10).to(base)), lc.LoraConfig(r=3, target_modules=["0"]))
    randomise(model)
    for matrices in (model[0].lora_a, model[0].lora_b):
        matrices.to(dtype)
    same = copy.deepcopy(model)
    for matrices in (same[0].lora_a, same[0].lora_b):
        matrices.to(base if dtype == base else torch.float32)
    x = torch.randn(4, 12).to(base)
    assert torch.equal(model(x), same(x))
    model(x).sum().backward()
    assert model[0].lora_a["default"].grad.dtype == dtype


class Two(nn.Module):
    """Reads one x twice, as attention does."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = linear(), linear()

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x)


def with_pefts_adapter(model):
    import peft

    given = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, given)


def with_own_adapter(model):
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    randomise(model)
    return model


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize(
    "adapted", [with_own_adapter, pytest.param(with_pefts_adapter, marks=pytest.mark.peer("peft"))], ids=["own", "peft"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_gives_the_rows_of_each_part(adapted, layout, fused):
    model = adapted(Two())
    if fused:
        assert lc.fuse(model).shared
    # more rows than siblings leave to each of them
    parts = [torch.randn(m, 12, dtype=torch.float64) for m in (70, 80)]
    got = model(torch.nested.nested_tensor(parts, layout=layout))
    for y, part in zip(got.unbind(), parts, strict=True):
        assert_same_function(y.detach(), model(part).detach())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_of_a_quantised_layer_is_refused_saying_how_to_pad_it():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 10)), skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]))
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(m, 64) for m in (5, 3)], layout=layout)
        with pytest.raises(lc.DtypeError, match=r"x is nested; want a dense tensor, e.g. x.to_padded_tensor"):
            model(nested)
        model(nested.to_padded_tensor(0.0))


@pytest.mark.peer("peft")
def test_embedding_that_scales_gradients_by_frequency_scales_the_adapters_as_peft_does():
    import peft

    base = nn.Sequential(nn.Embedding(10, 8, scale_grad_by_freq=True))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    model = lc.add_adapter(base, lc.LoraConfig(r=2, target_modules=["0"]))
    randomise(model)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_embedding_A["default"].copy_(model[0].lora_a["default"])
        layer.lora_embedding_B["default"].copy_(model[0].lora_b["default"])
    layer.scaling["default"] = model[0].adapters["default"].scaling
    tokens = torch.tensor([1, 1, 1, 2])
    for each in (model, theirs):
        each(tokens).sum().backward()
    assert torch.equal(model[0].lora_a["default"].grad, layer.lora_embedding_A["default"].grad)


def test_packed_codes_that_a_state_lacks_are_named_as_a_state_has_them():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 10)), skip_modules=[])
    state = model.state_dict()
    del state["0.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.weight"]
    with pytest.raises(RuntimeError, match='Missing key.*"0.weight"'):
        model.load_state_dict(state)


def test_weights_that_are_computed_anew_at_each_use_are_computed_as_often_as_unfused():
    """Spectral norm iterates at each use while training: read twice, it would go on by two steps."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = (parametrize_spectral(linear()) for _ in range(2))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x)

    def parametrize_spectral(layer):
        return nn.utils.parametrizations.spectral_norm(layer)

    torch.manual_seed(0)
    plain = lc.add_adapter(Attention(), lc.LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    randomise(plain)
    fused = copy.deepcopy(plain)
    lc.fuse(fused)
    # of so many rows that layers are computed together
    x = torch.randn(100, 12, dtype=torch.float64)
    for _ in range(3):
        assert_same_function(fused(x).detach(), plain(x).detach())
