"""The roofline page says what lora_core.plan.roofline says."""

import random

import pytest
from browser import check_page, chromium, opened, set_to

from lora_core.plan.roofline import BYTES, GPUS, PATHS, roofline


def shown_time(seconds):
    # rounded before the unit is chosen: 999.9 us are 1.00 ms
    seconds = float(f"{seconds:.2e}")
    scale, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")
    return seconds * scale, unit


@pytest.mark.browser
def test_roofline_page_says_what_the_library_says():
    draw = random.Random(1)
    with chromium() as browser, opened(browser, "roofline.html") as page:
        for _ in range(25):
            n, k = draw.choice([(4096, 4096), (1024, 4096), (777, 1234), (1, 1)])
            setting = {
                "n": n,
                "k": k,
                "m": draw.randint(0, 14),
                "rank": draw.randint(0, 9),
                "gpu": draw.choice(GPUS).name,
                "dtype": draw.choice([*BYTES]),
            }
            setting |= {"memory": draw.randint(10, 100), "matmul": draw.randint(10, 100)}
            for control, value in setting.items():
                set_to(page, control, value)
            assert page.input_value("#layer") == "own"
            gpu = next(gpu for gpu in GPUS if gpu.name == setting["gpu"])
            rank = 2 ** (setting["rank"] - 1) if setting["rank"] else 0
            shares = (setting["memory"] / 100, setting["matmul"] / 100)
            found = [roofline(2 ** setting["m"], n, k, rank, gpu, path, *shares, setting["dtype"]) for path in PATHS]
            rows = {
                cells[0]: cells[1:] for cells in (row.split("\t") for row in page.inner_text("#terms").splitlines())
            }
            for name, pick in {
                "weight, bytes": "weight_bytes", "activations, bytes": "activation_bytes",
                "adapter, bytes": "adapter_bytes", "base, operations": "base_operations",
                "adapter, operations": "adapter_operations",
            }.items():  # fmt: skip
                assert rows[name] == [f"{getattr(each, pick):,}" for each in found]
            assert rows["waits for"] == [each.binds for each in found]
            for name, pick in {
                "time of the bytes": "memory_s",
                "time of the operations": "compute_s",
                "least time": "total_s",
            }.items():
                for cell, each in zip(rows[name], found, strict=True):
                    value, unit = shown_time(getattr(each, pick))
                    # three digits are shown
                    assert cell.endswith(f" {unit}") and abs(float(cell.split()[0]) / value - 1) <= 0.00501
            for cell, each in zip(rows["operations a byte"], found, strict=True):
                assert abs(float(cell) / each.intensity - 1) <= 0.000501


@pytest.mark.browser
def test_roofline_page_fills_in_a_layers_sizes():
    with chromium() as browser, opened(browser, "roofline.html") as page:
        set_to(page, "layer", "28672 8192")
        assert (page.input_value("#n"), page.input_value("#k")) == ("28672", "8192")
        assert "469,762,048" in page.inner_text("#terms")
        set_to(page, "n", "")
        # nothing typed yet counts as 1
        assert "16,384" in page.inner_text("#terms") and "rows N: nothing counts as 1" in page.inner_text("#note")


@pytest.mark.browser
def test_roofline_page_works_on_phones_in_the_dark_and_by_keys():
    with chromium() as browser:
        check_page(browser, "roofline.html", "m")
