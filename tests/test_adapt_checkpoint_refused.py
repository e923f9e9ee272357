"""Adapters that do not fit, damaged and foreign files: refused with what is wrong, and the model left as it was."""

import json
import math
import os
import shutil
import warnings

import pytest
import torch
from checkpoints import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapted,
    assert_refused,
    decoder,
    rewrite,
    saved,
    shared,
    vision,
)
from models import TinyDecoder, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt import load
from lora_core.adapt.files import METADATA_KEY
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.adapter import AdapterLayer


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


def test_checkpoint_missing_keys_are_listed(folder):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n])
    assert_refused(
        folder, "missing in the file (4)", f"{PREFIX}layers.1.attn.q_proj.lora_A.weight", "Want the base model"
    )


def test_checkpoint_unexpected_keys_are_listed_with_the_nearest(folder):
    name = f"{PREFIX}layers.1.attn.q_proj.lora_A.weight"
    rewrite(folder, lambda t: t.update({name.replace("layers.1", "layers.7"): t.pop(name)}))
    assert_refused(folder, "unexpected in the file (1)", "layers.7", f"is it {name}?", "missing in the file (1)")


def test_checkpoint_long_lists_are_cut(folder):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t)[1:]])
    assert_refused(folder, "missing in the file (11)", "... and 3 more")


def test_checkpoint_wrong_shapes_are_listed(folder):
    rewrite(folder, lambda t: t.update({n: v[:, 1:].contiguous() for n, v in t.items()}))
    assert_refused(
        folder, "wrong shape or type (12)", "lora_A.weight: [4, 23] in the file, [4, 24] in the model", "unchanged"
    )


@pytest.mark.parametrize("rank", [5, 2**16])
@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_checkpoint_of_another_rank_is_refused_before_memory_is_taken(folder, field, rank, monkeypatch):
    rewrite(folder, config={field: rank if field == "r" else {"[qv]_proj": rank}})
    model = adapted(decoder(), "other", target_modules=["v_proj"])
    monkeypatch.setattr(AdapterLayer, "add", lambda *arguments: pytest.fail("an adapter's matrices were created"))
    name = "layers.0.attn.q_proj.lora_A.weight"
    told = f"{name}: [4, 24] in the file, rank {rank} in the configuration"
    assert_refused(folder, "of another rank (6)", told, "unchanged", model=model)


def test_checkpoint_of_integers_is_refused(folder):
    rewrite(folder, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}))
    assert_refused(folder, "[4, 24] int8 in the file, [4, 24] in the model")


def test_checkpoint_for_another_architecture_names_what_is_there(folder):
    with pytest.raises(lc.TargetNotFoundError, match="classifier"):
        lc.load_adapter(vision(), folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_checkpoint_truncated_weights_are_refused(folder, kept):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert_refused(folder, WEIGHTS, "truncated", "save it again")


def test_checkpoint_foreign_weights_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 10)
    assert_refused(folder, WEIGHTS, "foreign")


@pytest.mark.parametrize(
    ("text", "word"),
    [('{"r": 8,', "no JSON"), ("[1]", "list"), ("", "no JSON"), ("[" * 100_000, "nested too deeply")],
    ids=["truncated", "list", "empty", "deep"],
)
def test_checkpoint_broken_configuration_is_refused(folder, text, word):
    (folder / CONFIG).write_text(text)
    assert_refused(folder, CONFIG, word)


@pytest.mark.parametrize("copied", ["[" * 50_000, "[]", "5"], ids=["deep", "list", "number"])
def test_checkpoint_copy_of_the_configuration_that_is_none_is_ignored(folder, copied):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={METADATA_KEY: copied})
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_checkpoint_of_floats_that_cannot_be_computed_with_is_refused(folder):
    narrow = torch.zeros(4, 12, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    rewrite(folder, lambda t: t.update({f"{PREFIX}layers.1.attn.q_proj.lora_A.weight": narrow}))
    assert_refused(folder, "layers.1.attn.q_proj.lora_A.weight", "F4", "want float32")


def test_checkpoint_pickles_are_never_read(folder):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "exploded"),))

    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    lc.load_adapter(decoder(), folder)
    (folder / WEIGHTS).unlink()
    assert_refused(folder, "adapter_model.bin", "pickle", "save_file(torch.load(", "weights_only=True")
    # a pickle under the other name is no safetensors
    shutil.copy(folder / "adapter_model.bin", folder / WEIGHTS)
    assert_refused(folder, "foreign")
    assert not (folder / "exploded").exists()


def test_checkpoint_missing_folder_and_files_are_named(folder, tmp_path):
    assert_refused(tmp_path / "user" / "adapter", "no folder", "download")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", WEIGHTS, "holds nothing")
    (tmp_path / "empty" / WEIGHTS).symlink_to(tmp_path / "gone")
    assert_refused(tmp_path / "empty", f"{WEIGHTS} is a link to {tmp_path / 'gone'}, which does not exist")
    rewrite(folder)
    (folder / CONFIG).unlink()
    assert_refused(folder, f"has no {CONFIG}")


def test_checkpoint_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(lc.CheckpointError, match="is a file"):
        lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), tmp_path / "file")


def test_checkpoint_meta_device_is_refused_both_ways(folder, tmp_path):
    with torch.device("meta"):
        model = TinyDecoder()
    with pytest.raises(lc.CheckpointError, match="meta device.*load the base weights first"):
        lc.load_adapter(model, folder)
    assert not adapter_layers(model)
    lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lc.CheckpointError, match="meta device"):
        lc.save_adapter(model, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_checkpoint_unknown_adapter_and_taken_name_are_refused(folder, tmp_path):
    model = lc.load_adapter(decoder(), folder)
    with pytest.raises(lc.AdapterError, match="no adapter named 'x'"):
        lc.save_adapter(model, tmp_path, "x")
    with pytest.raises(lc.AdapterError, match="already"):
        lc.load_adapter(model, folder)


# warnings that somebody made errors: the model is left as it was by them too


def with_nan():
    return decoder, {"target_modules": ["q_proj"]}, {f"{PREFIX}layers.0.attn.q_proj.lora_A.weight": math.nan}


def with_another_base():
    wanted = {"target_modules": ["embed_tokens"], "bias": "all"}
    return decoder, wanted, {f"{PREFIX}embed_tokens.base_layer.weight": 0.5}


def with_two_names():
    return shared, {"target_modules": ["first"]}, {}


@pytest.mark.parametrize(
    ("case", "word"),
    [(with_nan, "NaN"), (with_another_base, "base weights that differ"), (with_two_names, "one module")],
)
@pytest.mark.filterwarnings("ignore:first is second:UserWarning")
def test_checkpoint_warning_made_an_error_leaves_the_model_as_it_was(tmp_path, case, word):
    make, config, values = case()
    lc.save_adapter(adapted(make(), **config), tmp_path)
    shapes = {name: (4 if "lora" in name else 37, 24) for name in values}
    rewrite(tmp_path, lambda t: t.update({n: torch.full(shapes[n], v) for n, v in values.items()}))
    target = config["target_modules"] if make is shared else ["v_proj"]
    model = adapted(make(), "other", target_modules=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(tmp_path, word, model=model, error=UserWarning)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_checkpoint_warning_made_an_error_comes_before_a_start_is_taken_out(tmp_path, init):
    """Put back, the base weights would be those before up to rounding alone."""
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), tmp_path)
    other = torch.full((37, 24), 0.5)
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}embed_tokens.weight": other}), {"init_lora_weights": init})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(tmp_path, "base weights that differ", error=UserWarning)


@pytest.mark.parametrize("place", ["check_fit", "_fill"])
def test_checkpoint_load_that_is_interrupted_leaves_the_model_as_it_was(folder, monkeypatch, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lora_core.adapt.load.{place}", interrupted)
    assert_refused(folder, error=KeyboardInterrupt)


@pytest.mark.parametrize("call", [1, 2])
def test_checkpoint_load_that_is_interrupted_puts_the_bases_own_biases_back(tmp_path, monkeypatch, call):
    model = adapted(decoder(), target_modules=["q_proj"], bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1)
    lc.save_adapter(model, tmp_path)
    fill, calls = load._fill, []

    def interrupted(*args):
        fill(*args)
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(load, "_fill", interrupted)
    assert_refused(tmp_path, model=adapted(decoder(), "other", target_modules=["v_proj"]), error=KeyboardInterrupt)


def test_checkpoint_beside_a_partial_file_whose_metadata_are_no_text_is_loaded(folder):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps({"__metadata__": {METADATA_KEY: 5}}).encode()
    (folder / f".{WEIGHTS}.0123.partial").write_bytes(len(text).to_bytes(8, "little") + text)
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_checkpoint_whose_metadata_are_nested_deeper_than_is_read_is_loaded(folder):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # of a tensor, where safetensors does not look
    header = {k: v | {"more": [0]} if "dtype" in v else v for k, v in header.items() if k != "__metadata__"}
    text = json.dumps(header).replace("[0]", "[" * 100 + "]" * 100).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_checkpoint_without_the_biases_it_should_have_says_how_to_load_the_rest(tmp_path):
    """PEFT before 0.21 did not save those of bias='lora_only'."""
    lc.save_adapter(adapted(decoder(), target_modules=["v_proj"], bias="lora_only"), tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("bias")])
    assert_refused(tmp_path, "missing in the file", "'none' in adapter_config.json loads the rest")
    rewrite(tmp_path, config={"bias": "none"})
    lc.load_adapter(decoder(), tmp_path)


# what PEFT and others write besides


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_checkpoint_of_eight_bit_floats_loads_in_the_adapters_own_dtype(folder, tmp_path, dtype):
    rewrite(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    wanted = {n: t.float() for n, t in load_file(folder / WEIGHTS).items()}
    model = lc.load_adapter(decoder(), folder)
    lc.save_adapter(model, tmp_path / "again")
    found = load_file(tmp_path / "again" / WEIGHTS)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    assert torch.equal(lc.load_adapter(decoder(), tmp_path / "again")(tokens()), model(tokens()))


def test_checkpoint_of_eight_bit_floats_with_a_nan_is_reported(folder):
    rewrite(folder, lambda t: t.update({n: (v * math.nan).to(torch.float8_e4m3fn) for n, v in t.items()}))
    with pytest.warns(UserWarning, match="NaN or infinity in 12 tensors"):
        lc.load_adapter(decoder(), folder)


def test_checkpoint_extra_tensors_of_peft_are_accepted(tmp_path):
    whole = ["norm", "layers.2.attn"]
    config = {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": whole, "bias": "all"}
    model = adapted(decoder(), **config)
    lc.save_adapter(model, tmp_path)
    extra = {
        "embed_tokens.base_layer.weight": model.embed_tokens.weight,
        "norm.original_module.bias": model.norm.original.bias,
        "norm.original_module.weight": model.norm.original.weight,
        "norm.modules_to_save.bias": model.norm.copies["default"].bias,
        "layers.2.attn.modules_to_save.mine.v_proj.bias": model.layers[2].attn.copies["default"].v_proj.bias,
    }
    rewrite(tmp_path, lambda t: t.update({PREFIX + n: v.detach().clone() for n, v in extra.items()}))
    loaded = lc.load_adapter(decoder(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_checkpoint_embedding_weights_that_differ_are_written_and_reported(tmp_path):
    model = adapted(decoder(), target_modules=["embed_tokens"])
    with torch.no_grad():
        model.embed_tokens.base_layer.weight[3] = 0.5
    lc.save_adapter(model, tmp_path)
    weight = model.embed_tokens.weight.detach()
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}embed_tokens.base_layer.weight": weight}))
    with pytest.warns(UserWarning, match="embed_tokens.weight"):
        loaded = lc.load_adapter(decoder(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_checkpoint_weights_of_other_layers_are_not_accepted(folder):
    rewrite(folder, lambda t: t.update({f"{PREFIX}layers.0.up_proj.weight": torch.zeros(48, 24)}))
    assert_refused(folder, "unexpected in the file (1)", "layers.0.up_proj.weight")


def test_checkpoint_adapter_names_in_keys_are_understood(folder):
    def name_all(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".mine.weight")] = tensors.pop(name)

    wanted = lc.load_adapter(decoder(), folder)(tokens())
    rewrite(folder, name_all)
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)
    rewrite(folder, lambda t: t.update({n.replace("mine", "yours"): v + 1 for n, v in t.items()}))
    assert_refused(folder, "two different tensors", "one adapter in a file")


def test_checkpoint_modules_to_save_that_the_model_lacks_are_no_error(tmp_path):
    """PEFT lists both names that a classifier's head may have."""
    lc.save_adapter(adapted(vision(), target_modules=["stem"], modules_to_save=["classifier"]), tmp_path)
    rewrite(tmp_path, config={"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"})
    lc.load_adapter(vision(), tmp_path)


def test_checkpoint_weights_of_a_quantised_head_are_left_out(tmp_path):
    """PEFT saves the head with an adapter; held in 4 bits it cannot be written, and keeps its own."""
    config = {"target_modules": ["q_proj"]}
    lc.save_adapter(adapted(decoder(), **config), tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(37, 24)}))
    model = lc.quantize_model(decoder(), lc.NF4Config(block_size=32), skip_modules=[])
    before = model.lm_head.weight.dequantize()
    lc.load_adapter(model, tmp_path)
    assert torch.equal(model.lm_head.weight.dequantize(), before)


@pytest.mark.parametrize(("start", "warned"), [("pissa", False), ("olora", False), ("pissa_niter_4", True)])
def test_checkpoint_of_a_random_start_that_was_not_converted_is_warned_of(folder, start, warned):
    """An exact decomposition is repeated, a random one only approximately."""
    rewrite(folder, config={"init_lora_weights": start})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lc.load_adapter(decoder(), folder)
    found = [w.filename for w in caught if "repeated here only approximately" in str(w.message)]
    assert found == [__file__] * warned


def test_checkpoint_embedding_weights_of_a_wider_dtype_are_compared_in_the_models(tmp_path):
    model = decoder().to(torch.bfloat16)
    # as it was before it was rounded
    weight = decoder().embed_tokens.weight.detach()
    lc.save_adapter(adapted(model, target_modules=["embed_tokens"]), tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}embed_tokens.base_layer.weight": weight}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.load_adapter(decoder().to(torch.bfloat16), tmp_path)


def test_checkpoint_trained_bias_of_a_head_is_no_base_weight_that_differs(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})

    model = adapted(base(), target_modules=["body"], bias="all")
    lc.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = lc.load_adapter(base(), tmp_path)
    assert torch.equal(loaded["lm_head"].bias, model["lm_head"].bias)
