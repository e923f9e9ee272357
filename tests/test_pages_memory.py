"""The page on memory says what lora-core memory says, to the byte."""

import importlib.util
import math
import random

import pytest
from browser import PAGES, check_page, chromium, opened, set_to

from lora_core.plan.catalogue import SHAPES, find_shape
from lora_core.plan.fit import fit
from lora_core.plan.memory import plan_memory
from lora_core.plan.setup import METHODS, Setup


def generate():
    spec = importlib.util.spec_from_file_location("generate", PAGES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_data_is_what_the_library_says_today():
    module = generate()
    assert module.FILE.read_text("utf-8") == module.text(), "stale: python docs/interactive/generate.py"


@pytest.mark.browser
def test_memory_page_says_what_the_plan_says():
    draw = random.Random(0)
    settings = [
        {
            "model": shape.name,
            "targets": draw.choice(["all-linear", "attention", *([] if shape.fused else ["q_proj v_proj"])]),
            "rank": draw.randint(0, 9), "batch": draw.randint(1, 64),
            "sequence": draw.randint(6, int(math.log2(shape.positions or 2**15))),
            "dtype": draw.choice(["bfloat16", "float32"]), "optimizer": draw.choice(["adamw", "adamw_8bit", "sgd"]),
            "checkpointing": draw.random() < 0.5,
        }
        for shape in SHAPES
        for _ in range(3)
    ]  # fmt: skip
    with chromium() as browser, opened(browser, "memory.html") as page:
        for setting in settings:
            for control, value in setting.items():
                set_to(page, control, value)
            shape = find_shape(setting["model"])
            targets = setting["targets"].split() if " " in setting["targets"] else setting["targets"]
            rest = {k: setting[k] for k in ("batch", "dtype", "optimizer", "checkpointing")}
            plans = [
                plan_memory(
                    shape,
                    Setup(
                        method=m, targets=targets, rank=2 ** setting["rank"], sequence=2 ** setting["sequence"], **rest
                    ),
                )
                for m in METHODS
            ]
            lines = [[f"{plan.rows[i].bytes:,}" for plan in plans] for i in range(len(plans[0].rows))]
            lines += [[f"{plan.total_bytes:,}" for plan in plans], [f"{plan.trainable:,}" for plan in plans]]
            shown = [row.split("\t")[1:] for row in page.inner_text("#rows").splitlines()[1:]]
            assert shown == lines, setting


@pytest.mark.browser
def test_memory_page_offers_what_the_model_has():
    with chromium() as browser, opened(browser, "memory.html") as page:
        for control, value in {"targets": "q_proj v_proj", "sequence": 15, "model": "GPT-2"}.items():
            set_to(page, control, value)
        assert (page.input_value("#targets"), page.input_value("#sequence")) == ("attention", "10")
        assert "model=GPT-2&targets=attention" in page.url and "sequence=10" in page.url
        assert page.is_disabled("#targets option[value='q_proj v_proj']")
        set_to(page, "model", "Llama-3-8B")
        set_to(page, "targets", "q_proj v_proj")
        set_to(page, "sequence", 15)
        assert (page.input_value("#targets"), page.input_value("#sequence")) == ("q_proj v_proj", "15")


@pytest.mark.browser
def test_memory_page_says_what_fits():
    with chromium() as browser, opened(browser, "memory.html") as page:
        for model in ("Llama-2-7B", "Qwen2.5-0.5B"):
            set_to(page, "model", model)
            rows = [row.split("\t") for row in page.inner_text("#fits").splitlines()[1:]]
            for card, *cells in rows:
                for method, cell in zip(METHODS, cells, strict=True):
                    found = fit(find_shape(model), Setup(method=method), int(card.split()[0]) * 10**9)
                    assert cell.startswith("fits") == found.fits
                    most = {"rank": found.largest_rank, "batch": found.largest_batch}
                    most["sequence"] = found.largest_sequence
                    said = ", or ".join(f"{name} {size:,}" for name, size in most.items() if size)
                    assert cell == (f"fits; at most {said}" if found.fits else f"no; {said} would" if said else "no")


@pytest.mark.browser
def test_memory_page_works_on_phones_in_the_dark_and_by_keys():
    with chromium() as browser:
        check_page(browser, "memory.html", "batch")
