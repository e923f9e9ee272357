"""Planned bytes against those of real models: weights, states, saved tensors one by one, and the peak of a step."""

import itertools
from dataclasses import replace

import pytest
import torch
from models import TINY, recompute_activations, transformers_model

import lora_core as lc
from benchmarks.memory import peak_bytes
from lora_core.adapt.count import count_parameters
from lora_core.cpu import compiled
from lora_core.errors import ConfigError
from lora_core.plan.activations import kept_bytes
from lora_core.plan.catalogue import find_shape
from lora_core.plan.fit import SEARCH_END, fit
from lora_core.plan.memory import plan_memory, quantized_bytes
from lora_core.plan.setup import Setup
from lora_core.plan.shape import ModelShape

DTYPES = ("float32", "bfloat16")
METHODS = ("full", "lora", "qlora")
NAMES_IN_GPT2 = {"qkv_proj": "c_attn", "o_proj": "attn.c_proj", "up_proj": "c_fc", "down_proj": "mlp.c_proj"}

# The plan is a little more than a step takes, never less by more than the scalars and index tensors it leaves out. The
# most it is above is where temporary tensors rule: a small vocabulary under checkpointing.
LEAST, MOST = 0.98, 1.20


def setup_model(shape: ModelShape, setup: Setup):
    """A model as the setup describes it, ready to train."""
    model = transformers_model(shape, getattr(torch, setup.dtype)).train()
    if setup.method == "qlora":
        config = lc.NF4Config(block_size=setup.block_size, double_quant=setup.double_quant)
        lc.quantize_model(model, config, skip_modules=["lm_head"])
    if not setup.trains_all:
        other = {} if shape.rotary else NAMES_IN_GPT2
        names = [other.get(layer.name, layer.name) for layer in shape.targets(setup.targets)]
        lc.add_adapter(model, lc.LoraConfig(r=setup.rank, target_modules=names))
    if setup.checkpointing:
        recompute_activations(model)
    # so that the first block keeps what the others do
    model.enable_input_require_grads()
    return model


def loss_of(model, setup: Setup):
    ids = torch.arange(setup.tokens).view(setup.batch, setup.sequence) % model.config.vocab_size
    return model(input_ids=ids, labels=ids, use_cache=False)


def saved_bytes(model, setup: Setup) -> int:
    """Bytes of the distinct storages that the forward pass saves, the model's own and scalars left out."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    seen = {}

    def pack(tensor):
        # rotary tables and position numbers are one row for all sequences, not for each
        if tensor.numel() > 1 and tensor.shape[0] != 1:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss_of(model, setup)
    assert output.loss.requires_grad
    return sum(size for pointer, (_, size) in seen.items() if pointer not in own)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_are_those_autograd_saves(method, dtype, targets, checkpointing):
    setup = Setup(
        method=method, dtype=dtype, targets=targets, rank=5, batch=2, sequence=24, checkpointing=checkpointing
    )
    assert kept_bytes(TINY, setup) == saved_bytes(setup_model(TINY, setup), setup)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_of_a_model_with_norms_of_its_heads(method, dtype):
    shape = replace(TINY, head_norms=True, head_size=24)
    setup = Setup(method=method, dtype=dtype, rank=5, batch=2, sequence=24)
    assert kept_bytes(shape, setup) == saved_bytes(setup_model(shape, setup), setup)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("targets", ["all-linear", "attention", ["qkv_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_of_a_model_with_fused_layers(method, targets, monkeypatch):
    import models
    import transformers

    shape = replace(TINY, fused=True)
    config = transformers.Phi3Config(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    monkeypatch.setattr(models, "transformers_config", lambda shape: config)
    setup = Setup(method=method, dtype="bfloat16", targets=targets, rank=5, batch=2, sequence=24)
    model = setup_model(shape, setup)
    assert kept_bytes(shape, setup) == saved_bytes(model, setup)
    assert plan_memory(shape, setup).trainable == count_parameters(model)[0]


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["o_proj", "down_proj"]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_of_a_gpt2(method, dtype, targets):
    shape = ModelShape(
        name="gpt", layers=2, hidden=64, intermediate=192, heads=4, kv_heads=4, vocabulary=97, positions=32,
        gated=False, tied=True, biases=True, fused=True,
    )  # fmt: skip
    setup = Setup(method=method, dtype=dtype, targets=targets, rank=5, batch=2, sequence=24)
    model = setup_model(shape, setup)
    assert plan_memory(shape, setup).trainable == count_parameters(model)[0]
    # a CPU keeps a norm's mean and deviation in the dtype of x; the plan takes fp32, as on a GPU
    narrower = setup.tokens * (2 * shape.layers + 1) * 2 * (4 - setup.element_bytes)
    assert kept_bytes(shape, setup) - narrower == saved_bytes(model, setup)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_stay_are_those_of_the_real_tensors(method, dtype, optimizer):
    setup = Setup(method=method, dtype=dtype, rank=3, batch=1, sequence=8, optimizer=optimizer, master_copy=False)
    model = setup_model(TINY, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    # no master copy: the states follow the parameters' own dtype, so fp32 ones are asked for
    real = torch.optim.AdamW(trained) if optimizer == "adamw" else torch.optim.SGD(trained)
    loss_of(model, setup).loss.backward()
    real.step()
    rows = {row.name: row.bytes for row in plan_memory(TINY, setup).rows}
    tensors = itertools.chain(model.parameters(), *([m.buffers() for m in model.modules() if is_quantized(m)]))
    assert rows["weights"] + rows["adapters"] == sum(t.nbytes for t in tensors)
    assert rows["gradients"] == sum(p.grad.nbytes for p in trained)
    states = [t for state in real.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    # the plan's states are fp32 whatever the parameters are
    assert rows["optimiser states"] == sum(4 * t.numel() for t in states)
    assert plan_memory(TINY, setup).trainable == count_parameters(model)[0]


def is_quantized(module) -> bool:
    return isinstance(module, lc.quant.QuantizedWeight)


@pytest.mark.peer("transformers")
# the peak is in a block with the small vocabulary, at the logits with the large one
@pytest.mark.parametrize(("dtype", "vocabulary"), [("float32", 512), ("float32", 4000), ("bfloat16", 4000)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_peak_of_a_step_is_as_planned(method, dtype, checkpointing, vocabulary):
    shape = ModelShape(name="small", layers=6, hidden=256, intermediate=704, heads=4, kv_heads=2, vocabulary=vocabulary)
    setup = Setup(method=method, dtype=dtype, rank=8, batch=2, sequence=256, checkpointing=checkpointing)
    model = setup_model(shape, setup)

    def step():
        # the output holds the logits until the step is over
        output = loss_of(model, setup)
        output.loss.backward()

    # gradients are there when the measured pass begins, as in the plan
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    # loading Numba, at the last of many small calls, takes memory of its own
    compiled.load("nf4")
    taken = peak_bytes(step)
    rows = {row.name: row.bytes for row in plan_memory(shape, setup).rows}
    planned = rows["activations"] + rows["workspace"]
    # the CPU's dequantisation takes scratch of its own, 8 bytes an element
    scratch = 8 * max(layer.weights for layer in shape.linears) if method == "qlora" else 0
    assert LEAST * taken - scratch <= planned <= MOST * taken


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("elements", [1, 63, 64, 65, 16_385, 70_001])
def test_quantized_bytes_are_those_of_a_quantised_weight(elements, block_size, double_quant):
    weight = lc.quant.quantize_nf4(torch.ones(elements), block_size=block_size, double_quant=double_quant)
    assert quantized_bytes(elements, block_size, double_quant) == weight.nbytes


def test_master_copy_is_counted_for_full_fine_tuning_in_half_precision_alone():
    shape = find_shape("Llama-2-7B")
    for method, dtype, copied in (("full", "bfloat16", True), ("full", "float32", False), ("lora", "bfloat16", False)):
        rows = {row.name: row.bytes for row in plan_memory(shape, Setup(method=method, dtype=dtype)).rows}
        assert rows["master copy"] == (4 * shape.parameters if copied else 0)
    full = {row.name: row.bytes for row in plan_memory(shape, Setup(method="full")).rows}
    held = sum(full[name] for name in ("weights", "master copy", "gradients", "optimiser states"))
    assert held == 16 * shape.parameters


def test_eight_bit_states_take_a_byte_and_a_scale_and_small_tensors_stay_wide():
    # of rank 1, A and B of every layer have 64 or 160 elements, all below 4,096
    small = plan_memory(TINY, Setup(method="lora", rank=1, optimizer="adamw_8bit"))
    wide = plan_memory(TINY, Setup(method="lora", rank=1, optimizer="adamw"))
    assert small.total_bytes == wide.total_bytes
    shape = find_shape("Llama-2-7B")
    rows = {row.name: row.bytes for row in plan_memory(shape, Setup(method="full", optimizer="adamw_8bit")).rows}
    norms = (2 * shape.layers + 1) * shape.hidden
    # norms of 4,096 elements are just large enough
    assert norms and rows["optimiser states"] == 2 * (shape.parameters + 4 * shape.parameters // 256)


def test_fit_finds_the_edge_of_every_size():
    shape, budget = find_shape("Llama-2-7B"), 24 * 10**9
    for method in ("lora", "qlora"):
        setup = Setup(method=method, checkpointing=True)
        found = fit(shape, setup, budget)
        assert found.fits and found.total_bytes == plan_memory(shape, setup).total_bytes
        for name, most in (
            ("rank", found.largest_rank),
            ("batch", found.largest_batch),
            ("sequence", found.largest_sequence),
        ):
            assert plan_memory(shape, replace(setup, **{name: most})).total_bytes <= budget
            assert plan_memory(shape, replace(setup, **{name: most + 1})).total_bytes > budget


def takes(shape, setup, rank):
    return plan_memory(shape, replace(setup, rank=rank)).total_bytes


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["k_proj", "down_proj"]])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_fit_finds_the_largest_rank_that_trying_all_of_them_finds(optimizer, targets):
    """With 8-bit states a higher rank may take less: 4,096 elements have smaller states than 4,095."""
    shape = ModelShape(name="x", layers=3, hidden=96, intermediate=160, heads=4, kv_heads=2, vocabulary=30)
    setup = Setup(method="qlora", targets=targets, sequence=4, optimizer=optimizer)
    widest = max(min(layer.rows, layer.columns) for layer in shape.targets(targets))
    costs = [takes(shape, setup, rank) for rank in range(1, widest + 1)]
    assert (costs != sorted(costs)) == (optimizer == "adamw_8bit")
    for budget in {c + d for c in costs for d in (-1, 0)}:
        most = max((rank for rank, cost in enumerate(costs, 1) if cost <= budget), default=0)
        assert fit(shape, setup, budget).largest_rank == most


def test_fit_finds_a_rank_beyond_ranks_that_do_not_fit():
    shape = ModelShape(
        name="x", layers=24, hidden=1300, intermediate=1300, heads=10, kv_heads=10, vocabulary=1000
    )  # fmt: skip
    setup = Setup(method="qlora", targets=["q_proj"], sequence=16, optimizer="adamw_8bit")
    budget = 170_058_368
    assert takes(shape, setup, 3) > budget == takes(shape, setup, 4) < takes(shape, setup, 5)
    assert fit(shape, setup, budget).largest_rank == 4


def test_fit_goes_no_further_than_the_learned_positions():
    shape = find_shape("GPT-2")
    assert fit(shape, Setup(method="lora"), 24 * 10**9).largest_sequence == shape.positions


def test_fit_says_where_nothing_fits_and_where_everything_does():
    shape = find_shape("Llama-2-7B")
    none = fit(shape, Setup(method="full"), 24 * 10**9)
    assert not none.fits and none.largest_rank is None and none.largest_batch == none.largest_sequence == 0
    every = fit(TINY, Setup(method="lora", sequence=1), 10**15)
    assert every.largest_rank == 64 and every.largest_batch == SEARCH_END
    for budget in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="budget is .*; want more than 0"):
            fit(TINY, Setup(), budget)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dora"}, "method is 'dora'; want one of full, lora, qlora"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; want one of float32, bfloat16, float16"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"rank": 0}, "rank is 0"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"sequence": -1}, "sequence is -1"),
        ({"rank": 10**400}, "rank is 1000.*000; want a whole number of at most 4,294,967,296"),
        ({"block_size": 48}, "block_size is 48"),
        ({"double_quant": "no"}, "double_quant is 'no'; want True or False"),
        ({"checkpointing": 1}, "checkpointing is 1; want True or False"),
        ({"targets": 3}, "targets is 3; want a list of names, 'attention' or 'all-linear'"),
        ({"targets": ["q_proj", None]}, "targets is .*None.*; want a list of names"),
    ],
)
def test_setup_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Setup(**change)
