"""Models inside what training frameworks put around them: FSDP, DDP, averaging, checkpointing, offloading."""

import accelerate
import pytest
import torch
from checkpoints import assert_same_state, state
from models import randomise
from tolerance import assert_same_function
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lora_core as lc
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.adapter import AdapterLayer


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64))


def adapted(model=None):
    model = lc.add_adapter(model or base(), lc.LoraConfig(r=4, target_modules="all-linear"))
    randomise(model)
    return model


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Sequential))
    return model


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flat(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [AveragedModel, DistributedDataParallel, checkpointed, flat, sharded])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")
def test_an_adapter_is_saved_by_the_names_and_values_it_has_without_a_wrapper(wrap, tmp_path):
    want = adapted()
    lc.save_adapter(wrap(adapted()), tmp_path / "out")
    assert_same_state(state(lc.load_adapter(base(), tmp_path / "out", is_trainable=True)), state(want))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")
def test_a_sharded_model_is_fused_and_merged():
    """Its weights are whole inside a forward: no tensors of a class that knows better."""
    x = torch.randn(5, 64, dtype=torch.float64)
    model = sharded(adapted(base().double()))
    wanted = model(x)
    assert len(lc.fuse(model).swapped) == 2
    assert_same_function(model(x), wanted)
    lc.merge_adapter(model.eval())
    assert_same_function(model(x), wanted)
    lc.unmerge_adapter(model)
    assert_same_function(model(x), wanted)


def test_a_share_of_an_adapter_is_not_saved(tmp_path):
    """As FullyShardedDataParallel leaves outside its methods."""
    model = adapted()
    layer = model[1]
    layer.lora_a["default"] = nn.Parameter(layer.lora_a["default"].detach().flatten()[:100])
    with pytest.raises(
        lc.CheckpointError, match=r"1.lora_A.weight is \(100,\) here, a share of \(4, 64\): save inside"
    ):
        lc.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, flat, sharded])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")
def test_what_would_not_be_synchronised_is_refused(wrap, tmp_path):
    lc.save_adapter(adapted(), tmp_path / "out")
    model = wrap(adapted())
    with pytest.raises(lc.AdapterError, match="add adapters first, then wrap"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"), "second")
    with pytest.raises(lc.AdapterError, match="each process would train its own"):
        lc.load_adapter(model, tmp_path / "out", "second", is_trainable=True)
    assert len([n for n, _ in model.named_parameters() if "lora_" in n]) == 4


@pytest.mark.usefixtures("process_group")
def test_an_adapter_that_is_not_trained_goes_into_a_wrapped_model(tmp_path):
    want = adapted()
    lc.save_adapter(want, tmp_path / "out")
    x = torch.randn(3, 64)
    inner = base()
    inner[0].requires_grad_(False)
    model = DistributedDataParallel(inner)
    assert torch.equal(lc.load_adapter(model, tmp_path / "out")(x), want(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_distributed_checkpoints_follow_every_key_of_a_4_bit_model(double_quant):
    """They look each key up in the model, attribute by attribute."""
    config = lc.NF4Config(double_quant=double_quant)
    one, other = (adapted(lc.quantize_model(base(), config, skip_modules=[])) for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_()
    found = get_model_state_dict(one)
    assert found.keys() == one.state_dict().keys()
    set_model_state_dict(other, found)
    assert_same_state(state(other), state(one))


def test_a_4_bit_weight_has_no_other_attributes_than_before():
    plain = lc.quantize_nf4(torch.randn(64, 64), double_quant=False)
    for name in ("nested_quant_map", "quant_stat", "data"):
        with pytest.raises(AttributeError, match=name):
            getattr(plain, name)


def test_an_offloaded_adapter_is_saved_with_its_values(tmp_path):
    want = state(adapted())
    model = adapted()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model[1].lora_a["default"].is_meta
    lc.save_adapter(model, tmp_path / "out")
    assert_same_state(state(lc.load_adapter(base(), tmp_path / "out", is_trainable=True)), want)


def test_a_folder_that_may_not_be_looked_into_is_refused(tmp_path, unreadable):
    model, folder = adapted(), tmp_path / "locked"
    folder.mkdir()
    unreadable(folder)
    for verb in (lc.save_adapter, lc.load_adapter):
        with pytest.raises(lc.CheckpointError, match=r"folder .*: permission denied|cannot"):
            verb(model, folder / "inside", "default" if verb is lc.save_adapter else "second")


@pytest.mark.usefixtures("process_group")
def test_a_share_which_may_be_empty_is_merged_without_a_bound_of_its_elements(monkeypatch):
    """A rank below the number of processes leaves some of them no row of A."""
    model = sharded(adapted())
    monkeypatch.setattr(AdapterLayer, "delta_bound", lambda self, name: pytest.fail("asked of a share"))
    want = {n: m.weight.full_tensor() + m.delta("default").full_tensor() for n, m in adapter_layers(model).items()}
    lc.merge_adapter(model)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.weight.full_tensor(), want[name])


def reshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_what_is_merged_after_a_forward_outlasts_the_whole_weights_of_that_forward():
    """A root's weights stay whole after its forward, and what is written into them is lost with them."""
    x = torch.randn(5, 64, dtype=torch.float64)
    model = sharded(adapted(base().double())).eval()
    wanted = model(x)
    lc.merge_adapter(model)
    reshard(model)
    assert_same_function(model(x), wanted)
    lc.unmerge_adapter(model)
    reshard(model)
    assert_same_function(model(x), wanted)
