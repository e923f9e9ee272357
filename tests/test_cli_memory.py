"""`lora-core memory`: the tables say what the calculators say, and bad input is refused."""

import json

import pytest

from lora_core import cli


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
    assert "Qwen/Qwen2.5-7B" in run(capsys, "--list-models")
    assert {"Llama-3-70B", "GPT-3"} <= {m["name"] for m in json.loads(run(capsys, "--list-models", "--json"))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama"], "no model 'llama' is known; did you mean"),
        (["--model", "absent/config.json"], "cannot be read"),
        (["--method", "dora"], "method is 'dora'; want one of full, lora, qlora, all"),
        (["--rank", "0"], "rank is 0"),
        (["--targets", ","], "no target module was given"),
        (["--gpu-gb", "0"], "gpu-gb is 0"),
        (["--gpu-gb", "nan"], "gpu-gb is nan"),
        (["--block-size", "48"], "block_size is 48"),
    ],
)
def test_memory_refuses_what_it_cannot_plan(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["memory", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
