"""The same adapter in PEFT and here: files, logits, and twenty steps of training."""

import copy
import json

import pytest
import torch
from models import tokens
from safetensors.torch import load_file
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers

pytestmark = [
    pytest.mark.peer("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]

# Two sound ways to run one computation have rounding errors of one size, though not the same ones: over thousands of
# elements their root mean squares agree well within this factor.
ORDERS = 2

# An adapter that does anything changes the output by this many times what rounding does.
VISIBLE = 1000


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, groups=2, bias=False)
        # no dilation: PEFT gives A the base layer's stride and padding, and not its dilation
        self.over_time = nn.Conv1d(16, 24, 5)
        self.norm = nn.BatchNorm1d(24)
        self.classifier = nn.Linear(24, 32)

    def forward(self, x):
        x = torch.relu(self.deep(torch.relu(self.stem(x)))).flatten(2)
        return self.classifier(self.norm(self.over_time(x)).transpose(1, 2))


def llama(**fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=61)
    # weights large enough for attention to attend, so that a wrong q_proj shows
    more = {"num_key_value_heads": 2, "attention_bias": True, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, **more, **fields})
    return LlamaForCausalLM(config).eval()


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32)).eval()


def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    return LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=5, pad_token_id=0)).eval()


def conv_net():
    torch.manual_seed(0)
    return ConvNet().eval()


def image():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def text():
    return tokens(batch=4, length=24, vocabulary=61)


QV = ["q_proj", "v_proj"]
CASES = {
    "lora": (llama, {"target_modules": QV}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "expression": (llama, {"target_modules": r".*\.self_attn\.[qk]_proj"}),
    "rslora": (llama, {"target_modules": QV, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 7, "up_proj": 3},
            "alpha_pattern": {r".*\.1\..*": 5, "q_proj": 2},
        },
    ),
    "rslora with patterns": (
        llama,
        {"target_modules": QV, "use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
    ),
    "some layers": (llama, {"target_modules": QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save by an ending": (llama, {"target_modules": QV, "modules_to_save": ["norm"]}),
    "bias all": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": (llama, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "gpt2 all-linear": (gpt2, {"target_modules": "all-linear"}),
    "convolutions": (conv_net, {"target_modules": ["stem", "over_time"], "modules_to_save": ["norm"]}),
    "groups": (conv_net, {"target_modules": ["deep"], "bias": "all"}),
    "classifier": (classifier, {"target_modules": QV, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
    "pissa": (llama, {"target_modules": QV, "init_lora_weights": "pissa"}),
    "pissa of a transposed layer": (gpt2, {"target_modules": ["c_proj"], "init_lora_weights": "pissa"}),
    "olora": (llama, {"target_modules": QV, "init_lora_weights": "olora"}),
}


def in_peft(make, **config):
    import peft

    # PEFT appends to the lists it is given
    config = copy.deepcopy(config)
    return peft.get_peft_model(make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})).eval()


def in_ours(make, **config):
    return lc.add_adapter(make(), lc.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))


@torch.no_grad()
def scramble(model):
    """Change all that is trained: no B stays zero."""
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


@torch.no_grad()
def output(model):
    found = model(image().to(next(model.parameters()).dtype)) if "conv" in repr(model).lower()[:60] else model(text())
    return (found if isinstance(found, torch.Tensor) else found.logits).double()


def rms(t):
    return t.square().mean().sqrt().item()


def assert_same_output(ours, peers):
    """Both compute the same but for rounding: ours is as far from PEFT in float64 as PEFT is. Return how far."""
    truth = output(copy.deepcopy(peers).double())
    mine, theirs = output(ours), output(peers)
    assert rms(mine - truth) <= ORDERS * rms(theirs - truth)
    return rms(theirs - truth)


def pieces(tensors):
    return {n: t for n, t in tensors.items() if "lora_" in n}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products run slower on several threads, and much slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_peft_adapter_loads_here_and_gives_its_logits(case, tmp_path):
    make, config = CASES[case]
    peers = scramble(in_peft(make, **config))
    peers.save_pretrained(tmp_path)
    ours = make()
    base = output(ours)
    lc.load_adapter(ours, tmp_path)
    rounding = assert_same_output(ours, peers)
    assert rms(output(ours) - base) > VISIBLE * rounding
    for layer in adapter_layers(ours).values():
        assert layer.active == ("default",)
        assert layer.lora_b["default"].abs().max() > 0
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("case", CASES)
def test_adapter_made_here_loads_in_peft_and_gives_its_logits(case, tmp_path):
    import peft

    make, config = CASES[case]
    ours = scramble(in_ours(make, **config))
    lc.save_adapter(ours, tmp_path)
    peers = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_same_output(ours, peers)
    from peft.utils import get_peft_model_state_dict

    written = load_file(tmp_path / "adapter_model.safetensors")
    theirs = get_peft_model_state_dict(peers, save_embedding_layers=False)
    assert written.keys() == {n for n in theirs if ".original_module." not in n and ".modules_to_save." not in n}
    assert all(torch.equal(written[n], theirs[n]) for n in written)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": r".*\.[qk]_proj", "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 5}},
        {"target_modules": ["q_proj"], "init_lora_weights": "olora", "alpha_pattern": {r".*\.1\..*": 5}},
    ],
    ids=str,
)
def test_adapter_that_peft_could_not_make_or_convert_loads_there(config, tmp_path):
    import peft

    ours = scramble(in_ours(llama, **config))
    lc.save_adapter(ours, tmp_path)
    assert_same_output(ours, peft.PeftModel.from_pretrained(llama(), tmp_path).eval())


@pytest.mark.parametrize("case", CASES)
def test_adapter_through_both_libraries_comes_back_bit_for_bit(case, tmp_path):
    import peft

    make, config = CASES[case]
    ours = scramble(in_ours(make, **config))
    lc.save_adapter(ours, tmp_path / "ours")
    peers = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    peers.save_pretrained(tmp_path / "peft")
    again = lc.load_adapter(make(), tmp_path / "peft")
    lc.save_adapter(again, tmp_path / "again")
    first, last = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "again"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[n], last[n]) for n in first)
    values = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "peft", "again")]
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"):
        assert values[0][name] == values[1][name] == values[2][name], name
    # PEFT's own fields survive
    assert values[2].keys() >= values[1].keys()


def test_the_same_layers_are_trained(tmp_path):
    for case in ("all-linear", "modules_to_save", "bias all", "bias lora_only", "embedding", "gpt2", "convolutions"):
        make, config = CASES[case]
        peers, ours = in_peft(make, **config), in_ours(make, **config)
        counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (peers, ours)]
        assert counts[0] == counts[1], case


@pytest.mark.parametrize("case", ["lora", "embedding", "gpt2", "convolutions"])
def test_merging_gives_what_peft_merges(case, tmp_path):
    make, config = CASES[case]
    peers = scramble(in_peft(make, **config))
    peers.save_pretrained(tmp_path)
    ours = lc.load_adapter(make(), tmp_path)
    assert_same_output(lc.merge_and_unload(ours), peers.merge_and_unload())


def test_half_precision_base_has_adapters_of_the_same_dtype(tmp_path):
    def half():
        return llama().to(torch.bfloat16)

    peers = scramble(in_peft(half, target_modules=QV))
    peers.save_pretrained(tmp_path)
    ours = lc.load_adapter(half(), tmp_path)
    dtypes = [{p.dtype for n, p in m.named_parameters() if "lora_" in n} for m in (peers, ours)]
    assert dtypes[0] == dtypes[1] == {torch.float32}
    assert_same_output(ours, peers)


# twenty steps

STEPS = 20
TWINS = 6


def losses(model, steps=STEPS):
    """Train on fixed batches; the loss before each step."""
    g = torch.Generator().manual_seed(5)
    batches = torch.randint(61, (steps, 4, 24), generator=g)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    found = []
    for batch in batches % 17:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def nudged(model, seed):
    """A twin whose every parameter is the next number above or below: what one rounding may do."""
    g = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        up = torch.rand(parameter.shape, generator=g) < 0.5
        infinity = torch.where(up, torch.inf, -torch.inf)
        parameter.copy_(torch.where(parameter == 0, parameter, torch.nextafter(parameter, infinity)))
    return twin


def test_training_follows_peft_within_rounding(tmp_path):
    """As close to PEFT as PEFT is to itself from a start moved by one unit in the last place of every parameter."""
    peers = in_peft(llama, target_modules="all-linear", lora_alpha=16).train()
    peers.save_pretrained(tmp_path)
    ours = lc.load_adapter(llama(), tmp_path, is_trainable=True).train()
    twins = [nudged(peers, seed) for seed in range(TWINS)]
    theirs = losses(peers)
    spread = torch.stack([(losses(twin) - theirs).abs() for twin in twins])
    # one rounding per parameter is the least that rounding does; this is what it has become by each step. The loss
    # itself is rounded too.
    bound = spread.max(dim=0).values.cummax(dim=0).values + torch.finfo(torch.float32).eps * theirs
    assert ((losses(ours) - theirs).abs() <= ORDERS * bound).all()
    assert theirs[-1] < theirs[0]
    # the bound is narrow enough to see an error: a scaling that is wrong by a thousandth
    wrong = lc.load_adapter(llama(), tmp_path, is_trainable=True).train()
    for layer in adapter_layers(wrong).values():
        layer.adapters["default"].scaling *= 1.001
    assert not ((losses(wrong) - theirs).abs() <= ORDERS * bound).all()


def test_adapter_of_whole_modules_alone_loads_in_peft(tmp_path):
    import peft

    model = lc.add_adapter(llama(), lc.LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.copies["default"].weight.add_(0.1)
    lc.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    wanted = model(input_ids=text()).logits
    assert torch.equal(theirs(input_ids=text()).logits, wanted)
    assert torch.equal(lc.load_adapter(llama(), tmp_path)(input_ids=text()).logits, wanted)
