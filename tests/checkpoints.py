"""Models with adapters, folders they are saved in, and what the tests of checkpoints say of them."""

import json

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers, adapter_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class TinyVision(nn.Module):
    """Convolutions over one and two dimensions, with groups, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mixer = nn.Conv2d(8, 8, (1, 3), groups=2, padding="same", bias=False)
        self.over_time = nn.Conv1d(8, 6, 5, dilation=2)
        self.norm = nn.BatchNorm1d(6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.mixer(torch.relu(self.stem(x)))).flatten(2)
        return self.classifier(self.norm(self.over_time(x)).mean(-1))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def decoder():
    torch.manual_seed(0)
    return TinyDecoder().eval()


def tied():
    torch.manual_seed(0)
    return TinyDecoder(tied=True).eval()


def vision():
    torch.manual_seed(0)
    return TinyVision().eval()


def shared():
    torch.manual_seed(0)
    return Shared().eval()


def half():
    return decoder().to(torch.bfloat16)


def wide():
    return decoder().double()


def nf4():
    return lc.quantize_model(decoder(), lc.NF4Config(block_size=32))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), Conv1D(7, 5), nn.Linear(7, 3)).eval()


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def rows():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


KINDS = {
    "linear": (decoder, tokens, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (decoder, tokens, {"target_modules": "all-linear"}),
    "expression": (decoder, tokens, {"target_modules": r"layers\.\d\.attn\..*"}),
    "embedding and head": (decoder, tokens, {"target_modules": ["embed_tokens", "lm_head"]}),
    "convolutions": (vision, image, {"target_modules": ["stem", "mixer", "over_time"]}),
    "transformers' Conv1D": (conv1d, rows, {"target_modules": ["1"]}),
    "all-linear with numbers": (conv1d, rows, {"target_modules": "all-linear", "exclude_modules": ["2"]}),
    "nf4": (nf4, tokens, {"target_modules": "all-linear"}),
    "rslora": (decoder, tokens, {"target_modules": ["up_proj"], "use_rslora": True}),
    "patterns": (
        decoder,
        tokens,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.0.attn.q_proj": 7, "up_proj": 3},
            "alpha_pattern": {r".*\.1\..*": 5, "q_proj": 0.5},
        },
    ),
    "some layers": (decoder, tokens, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "one layer of all": (decoder, tokens, {"target_modules": "all-linear", "layers_to_transform": 1}),
    "modules_to_save": (decoder, tokens, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save with buffers": (vision, image, {"target_modules": ["classifier"], "modules_to_save": ["norm"]}),
    "modules_to_save alone": (decoder, tokens, {"modules_to_save": ["lm_head"]}),
    "bias all": (decoder, tokens, {"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["norm"]}),
    "bias lora_only": (decoder, tokens, {"target_modules": ["v_proj"], "bias": "lora_only"}),
    "tied": (tied, tokens, {"target_modules": ["embed_tokens", "q_proj"]}),
    "two names": (shared, rows, {"target_modules": ["first"], "bias": "all"}),
    "bfloat16": (half, tokens, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "float64": (wide, tokens, {"target_modules": "all-linear"}),
}


@torch.no_grad()
def scramble(model):
    """Give all that an adapter can train other values."""
    randomise(model)
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter.dtype))


def adapted(model, name="default", **config):
    lc.add_adapter(model, lc.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}), name)
    scramble(model)
    return model


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def state(model):
    """All tensors of a model, with what requires gradients."""
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return tensors, trained(model), {n: type(m) for n, m in model.named_modules()}


def assert_same_state(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][n], other[0][n]) for n in one[0])


def read(folder):
    return json.loads((folder / CONFIG).read_text())


def assert_same_tensors(one, other):
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def rewrite(folder, change=lambda tensors: None, config=None):
    """Write a folder's weights anew as PEFT would: without a configuration inside."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if config is not None:
        (folder / CONFIG).write_text(json.dumps({**read(folder), **config}))


def saved(place):
    """Return a folder in this place that an adapter is saved in."""
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj", "v_proj"]), place / "adapter")
    return place / "adapter"


def assert_refused(folder, *words, model=None, error=lc.CheckpointError):
    """Loading fails with these words, and leaves a model that had another adapter as it was."""
    model = model or adapted(decoder(), "other", target_modules=["v_proj"], modules_to_save=["norm"])
    before = state(model)
    with pytest.raises(error) as caught:
        lc.load_adapter(model, folder, "new")
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert_same_state(state(model), before)
    assert adapter_names(model) == ["other"]
    assert all(layer.active == ("other",) for layer in adapter_layers(model).values())
