"""`lora-core memory`: the tables say what the calculators say, and bad input is refused."""

import json
import re

import pytest

from lora_core import cli
from lora_core.commands import memory as command
from lora_core.plan.config_file import MODEL_TYPES


def run(capsys, *arguments):
    cli.main(["memory", *arguments])
    return capsys.readouterr().out


def test_memory_shows_three_methods_side_by_side(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    shown = run(capsys)
    assert "Llama-2-7B: 6,738,415,616 parameters" in shown
    assert "39,976,960" in shown and "0.5898 %" in shown
    assert all(word in shown for word in ("full", "lora", "qlora", "activations", "workspace", "total"))


def test_memory_says_what_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ("--gpu-gb", "24", "--checkpointing")
    shown = run(capsys, *arguments)
    data = json.loads(run(capsys, *arguments, "--json"))
    fits = {plan["setup"]["method"]: plan["fit"] for plan in data["plans"]}
    assert [fits[method]["fits"] for method in ("full", "lora", "qlora")] == [False, True, True]
    assert "none fits" in shown and f"{fits['qlora']['largest_rank']:,}" in shown


def whole_words(shown):
    return {word for line in shown.splitlines() for word in line.replace("│", " ").split()}


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_memory_is_whole_on_a_narrow_terminal(columns, capsys, monkeypatch):
    arguments = ("--gpu-gb", "24")
    monkeypatch.setenv("COLUMNS", "200")
    wide = run(capsys, *arguments)
    monkeypatch.setenv("COLUMNS", columns)
    narrow = run(capsys, *arguments)
    assert {w for w in whole_words(wide) if any(c.isdigit() for c in w)} <= whole_words(narrow)
    for label in ("optimiser states", "trained parameters", "6,738,415,616", "114.68", "1,668"):
        assert label in narrow
    assert {"longest", "sequence"} <= set(re.findall(r"\w+", narrow))


def test_memory_models_are_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = run(capsys, "--list-models")
    for model in json.loads(run(capsys, "--list-models", "--json")):
        assert model["name"] in shown.splitlines()
        assert {f"{model[size]:,}" for size in ("parameters", "hidden", "vocabulary")} <= whole_words(shown)


def test_memory_json_adds_up(capsys):
    data = json.loads(
        run(capsys, "--model", "qwen2.5-7b", "--method", "qlora", "--targets", "q_proj, v_proj", "--json")
    )
    (plan,) = data["plans"]
    assert data["parameters"] == 7_615_616_512 and plan["setup"]["targets"] == ["q_proj", "v_proj"]
    assert plan["total_bytes"] == sum(row["bytes"] for row in plan["rows"])
    assert "fit" not in plan


def test_memory_takes_a_config_file(capsys, tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10, **sizes}))
    for path in (tmp_path, tmp_path / "config.json"):
        # two tables of 10 x 8; a block of 4 x 8 x 8, 3 x 8 x 12 and two norms of 8; the last norm
        assert json.loads(run(capsys, "--model", str(path), "--json"))["parameters"] == 160 + 2 * 560 + 8


def test_memory_shows_figures_and_models(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(capsys, "--figures")
    assert "33,820,672" in shown and "prefix" in shown and "IA3" in shown
    assert len(json.loads(run(capsys, "--figures", "--json"))["methods"]) == 6
    other = json.loads(run(capsys, "--figures", "--model", "Mistral-7B", "--rank", "8", "--json"))
    # 32 blocks of q and o 4096 x 4096, k and v 1024 x 4096
    assert (other["model"], other["methods"][1]["trainable"]) == ("Mistral-7B", 32 * 8 * 2 * (8192 + 5120))
    assert "Mistral-7B" in run(capsys, "--figures", "--model", "Mistral-7B")
    assert "Qwen/Qwen2.5-7B" in run(capsys, "--list-models")
    assert {"Llama-3-70B", "GPT-3"} <= {m["name"] for m in json.loads(run(capsys, "--list-models", "--json"))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama"], "no model 'llama' is known; did you mean"),
        (["--model", "absent/config.json"], "cannot be read"),
        (["--model", "Qwen/Qwen2.5-3B"], "want a model's config.json, downloaded before, or a known model's name"),
        (["--model", "gpt-2", "--seq", "1025"], "GPT-2 has learned 1,024 positions"),
        (["--method", "dora"], "method is 'dora'; want one of full, lora, qlora, all"),
        (["--rank", "0"], "rank is 0"),
        (["--targets", ","], "no target module was given"),
        (["--gpu-gb", "0"], "gpu-gb is 0"),
        (["--gpu-gb", "nan"], "gpu-gb is nan"),
        (["--block-size", "48"], "block_size is 48"),
        (
            ["--gpu-gb", "1e300"],
            "gpu-gb is 1e+300; want the card's memory in GB, more than 0 and at most 1,000,000,000",
        ),
        (["--rank", str(10**400)], "rank is 1000"),
        (["--batch", str(10**400)], "batch is 1000"),
        (["--model", "x" * 300], "is known. Known: "),
        (["--model", "Nope"], "no model 'Nope' is known. Known: "),
        (["--model", "x" * 300 + "/config.json"], "cannot be read: file name too long"),
        (["--model", ""], "no model '' is known"),
    ],
)
def test_memory_refuses_what_it_cannot_plan(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["memory", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_memory_with_the_largest_sizes_is_still_a_number(capsys):
    size = str(2**32)
    run(capsys, "--rank", size, "--batch", size, "--seq", size, "--gpu-gb", "1e9", "--optimizer", "adamw_8bit")


def test_memory_takes_the_name_of_a_known_repository(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(run(capsys, "--model", "Qwen/Qwen2.5-7B", "--json"))["model"]["name"] == "Qwen2.5-7B"


def test_memory_with_an_empty_name_reads_no_config_of_the_current_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["memory", "--model", ""])
    assert "no model '' is known" in capsys.readouterr().err


def test_memory_says_that_permission_is_denied(capsys, tmp_path, unreadable):
    (tmp_path / "config.json").write_text("{}")
    unreadable(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["memory", "--model", str(path)])
        assert stop.value.code == 2
        assert "permission denied" in capsys.readouterr().err


def test_memory_help_names_the_model_types_it_reads():
    assert command.MODEL_TYPES.replace(" or ", ", ").split(", ") == list(MODEL_TYPES)
