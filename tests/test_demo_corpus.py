"""The demo's text, tokenizer, model and base."""

import ast
import inspect
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lora_core.demo.base import SHIPPED, load_base
from lora_core.demo.corpus import CODE_LIMIT_BYTES, HELD_OUT_ONE_IN, _definitions, digest, load_corpus
from lora_core.demo.data import nats_per_byte, token_stream, training_batch
from lora_core.demo.model import GPT, GPTConfig
from lora_core.demo.pretrain import PretrainSettings, _resume, _train, pretrain
from lora_core.demo.schedule import learning_rate_at
from lora_core.demo.tokenizer import Tokenizer, train_tokenizer
from lora_core.errors import CheckpointError

TINY = GPTConfig(vocabulary=300, context=16, width=32, layers=2, heads=2, dropout=0.1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other lose much time where other tests take the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def base():
    return load_base()


def test_demo_corpus_is_deterministic(corpus):
    assert load_corpus() == corpus


def test_demo_corpus_splits_by_content_without_overlap(corpus):
    for domain in (corpus.prose, corpus.code):
        train, held_out = ({digest(text) for text in side} for side in (domain.train, domain.held_out))
        assert train and held_out and not train & held_out
        assert len(train) == len(domain.train) and len(held_out) == len(domain.held_out)
        assert all(int(key[-8:], 16) % HELD_OUT_ONE_IN == 0 for key in held_out)
        assert all(int(key[-8:], 16) % HELD_OUT_ONE_IN for key in train)


def test_demo_corpus_code_is_capped_and_holds_no_docstring_prose(corpus):
    code = [*corpus.code.train, *corpus.code.held_out]
    longest = max(len(text.encode()) for text in code)
    assert sum(len(text.encode()) for text in code) < CODE_LIMIT_BYTES + longest
    parsed = 0
    for text in code:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            # a body that held nothing but its docstring
            continue
        parsed += 1
        if ast.get_docstring(tree):
            pytest.fail(f"a module's docstring is left: {text[:80]!r}")
    assert parsed > len(code) // 4


def test_demo_corpus_finds_docstrings_wherever_a_definition_can_stand():
    source = """
        try:
            def a(): "of a try"
        except OSError:
            def b(): "of an except"
        else:
            class C: "of an else"
        match 1:
            case 1:
                async def d(): "of a case"
        """
    found = {ast.get_docstring(node) for node in _definitions(ast.parse(inspect.cleandoc(source)))}
    assert found == {None, "of a try", "of an except", "of an else", "of a case"}


def test_demo_corpus_digest_ignores_indentation():
    assert digest("a  b\n    c") == digest("a b c") != digest("a b d")


def test_demo_tokenizer_gives_every_text_back(base, corpus):
    for text in (*corpus.prose.held_out[:20], "naïve — 雪\t\0\n\n   x", ""):
        assert base.tokenizer.decode(base.tokenizer.encode(text)) == text


def test_demo_tokenizer_learns_the_most_frequent_pair_first():
    tokenizer = train_tokenizer(["abab abab ab", "xy"], 259)
    assert tokenizer.merges[0] == (ord("a"), ord("b"))
    assert tokenizer.spelling[-1] == b"abab"


def test_demo_tokenizer_is_deterministic_and_survives_a_file(tmp_path):
    text = ["one two two three three three", "def one(two): return three"]
    first, second = train_tokenizer(text, 280), train_tokenizer(text, 280)
    assert first.merges == second.merges
    first.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").merges == first.merges


def test_demo_tokenizer_refuses_a_foreign_file(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"t\.json.*lora-core demo --pretrain"):
        Tokenizer.load(tmp_path / "t.json")


def test_demo_model_sees_no_token_ahead():
    model = GPT(TINY).double().eval()
    tokens = torch.randint(300, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 300
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_demo_model_knows_the_order_of_tokens():
    model = GPT(TINY).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model(tokens)[0, -1], model(tokens[:, [1, 0, 2, 3]])[0, -1])


def test_demo_batches_depend_on_seed_and_step_alone():
    stream = torch.arange(1000)
    first, targets = training_batch(stream, 4, 16, seed=1, step=2)
    torch.manual_seed(99)
    assert torch.equal(first, training_batch(stream, 4, 16, seed=1, step=2)[0])
    assert torch.equal(first + 1, targets)
    assert not torch.equal(first, training_batch(stream, 4, 16, seed=1, step=3)[0])
    assert not torch.equal(first, training_batch(stream, 4, 16, seed=2, step=2)[0])


class Uniform(torch.nn.Module):
    """Takes every token for as likely; keeps the first of each window it is shown."""

    def __init__(self, vocabulary):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.vocabulary, self.shown = vocabulary, []

    def forward(self, tokens):
        self.shown.extend(tokens[:, 0].tolist())
        return self.anchor + torch.zeros(*tokens.shape, self.vocabulary)


def test_demo_nats_per_byte_of_a_uniform_guess_is_the_vocabulary_over_the_bytes():
    tokenizer = Tokenizer([(97, 98)])
    # "ab" is one token of two bytes: half the nats of a token that spells one
    stream = torch.full((65,), 257)
    assert math.isclose(nats_per_byte(Uniform(len(tokenizer)), stream, tokenizer, 16), math.log(258) / 2)


def test_demo_nats_per_byte_of_some_windows_takes_them_evenly_from_the_whole_stream():
    model = Uniform(257)
    nats_per_byte(model, torch.arange(81), Tokenizer([]), 8, limit=5)
    assert model.shown == [0, 16, 32, 48, 64]


def test_demo_learning_rate_rises_then_falls_to_a_twentieth():
    rates = [learning_rate_at(step, 100, 1.0, 10) for step in range(101)]
    assert rates.index(max(rates)) in (9, 10) and 0.1 == rates[0] < rates[5] < rates[9]
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert math.isclose(rates[-1], 0.05)


def test_demo_base_reads_prose_as_well_as_its_record_says(base, corpus):
    held_out = token_stream(corpus.prose.held_out, base.tokenizer)
    loss = nats_per_byte(base.model(), held_out, base.tokenizer, base.config.context)
    if corpus.prose.sha256 == base.record["prose_sha256"]:
        # the sum of 40,000 tokens' float32 losses, made with other threads or another build
        assert abs(loss - base.record["held_out_nats_per_byte"]) < 40_000 * torch.finfo(torch.float32).eps
    assert loss < base.record["untrained_nats_per_byte"] / 2


def test_demo_base_is_small_and_its_two_records_are_one(base):
    assert base.file_bytes <= 8_000_000
    assert base.record == json.loads((SHIPPED / "base.json").read_text())
    assert {"command", "prose_sha256", "steps", "held_out_nats_per_byte"} <= base.record.keys()


@pytest.mark.parametrize("harm", ["missing", "truncated", "foreign", "other tokenizer"])
def test_demo_base_refuses_a_broken_folder(tmp_path, harm):
    for name in ("base.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    file = tmp_path / "base.safetensors"
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[:100_000])
    elif harm == "foreign":
        file.write_bytes(b"not a model")
    else:
        Tokenizer([(97, 98)]).save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="want"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters", None),
        ("steps", "many"),
        ("held_out_nats_per_byte", math.nan),
        ("prose_sha256", 7),
    ],
)
@pytest.mark.parametrize("absent", [False, True])
def test_demo_base_refuses_a_record_that_a_run_could_not_report(tmp_path, base, field, value, absent):
    record = {k: v for k, v in base.record.items() if k != field} | ({} if absent else {field: value})
    broken_base(tmp_path, base.state, record)
    with pytest.raises(CheckpointError, match=field):
        load_base(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_demo_base_refuses_weights_that_are_not_finite(tmp_path, base, value):
    state = {name: tensor.clone() for name, tensor in base.state.items()}
    state["norm.weight"][3] = value
    broken_base(tmp_path, state, base.record)
    with pytest.raises(CheckpointError, match="norm.weight in .* holds NaN or infinity"):
        load_base(tmp_path)


def broken_base(folder, state, record):
    save_file(state, folder / "base.safetensors", metadata={"record": json.dumps(record)})
    (folder / "tokenizer.json").write_bytes((SHIPPED / "tokenizer.json").read_bytes())


@pytest.mark.parametrize("harm", ["foreign", "truncated", "another model", "no file"])
def test_demo_pretraining_names_a_checkpoint_that_it_cannot_go_on_from(tmp_path, harm):
    scratch = tmp_path / "unfinished-4-3.safetensors"
    save_file({"step": torch.tensor(2), "norm.weight": torch.ones(3)}, scratch)
    if harm == "foreign":
        scratch.write_bytes(b"not a checkpoint")
    elif harm == "truncated":
        scratch.write_bytes(scratch.read_bytes()[:-3])
    elif harm == "no file":
        scratch.unlink()
    model = GPT(TINY)
    with pytest.raises(CheckpointError, match=r"unfinished-4-3\.safetensors is no checkpoint.*remove it"):
        _resume(model, torch.optim.AdamW(model.parameters()), scratch)


def test_demo_pretraining_goes_on_from_a_checkpoint_with_the_same_result(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("lora_core.demo.pretrain.train_tokenizer", lambda text, size: Tokenizer([]))
    short = type(corpus.prose)("prose", corpus.prose.train[:300], corpus.prose.held_out[:20], corpus.prose.sha256)
    monkeypatch.setattr("lora_core.demo.pretrain.load_corpus", lambda: type(corpus)(short, corpus.code))
    settings = PretrainSettings(steps=4, seed=3, batch=2, bfloat16=False, threads=1)
    config = GPTConfig(vocabulary=257, context=16, width=32, layers=1, heads=2)
    whole = pretrain(tmp_path / "whole", settings, config)
    monkeypatch.setattr("lora_core.demo.pretrain.CHECKPOINT_SECONDS", 0.0)
    scratch = tmp_path / "scratch.safetensors"
    stopped = pytest.MonkeyPatch()
    calls = []

    def stop_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return training_batch(*arguments)

    with stopped.context() as patch:
        patch.setattr("lora_core.demo.pretrain.training_batch", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "resumed", settings, config, scratch)
    assert not (tmp_path / "resumed" / "base.safetensors").exists()
    resumed = pretrain(tmp_path / "resumed", settings, config, scratch)
    assert resumed["held_out_nats_per_byte"] == whole["held_out_nats_per_byte"] < whole["untrained_nats_per_byte"]
    first, second = (load_base(tmp_path / name).state for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # what is recorded was measured of what is kept, which is rounded to half precision
    base = load_base(tmp_path / "whole")
    kept = nats_per_byte(base.model(), token_stream(short.held_out, base.tokenizer), base.tokenizer, config.context)
    assert kept == whole["held_out_nats_per_byte"]


def test_demo_pretraining_decays_matrices_and_no_norms(monkeypatch):
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **rest: made.append(adamw(*args, **rest)) or made[-1])
    settings = PretrainSettings(steps=1, batch=1, bfloat16=False)
    _train(GPT(TINY), torch.arange(290), torch.arange(290), Tokenizer([]), settings, None)
    decays = {p.ndim: group["weight_decay"] for group in made[0].param_groups for p in group["params"]}
    assert decays == {2: settings.weight_decay, 1: 0.0} and settings.weight_decay > 0
