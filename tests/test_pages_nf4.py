"""The NF4 page quantises as the library does: codes, values, errors and bits."""

import pytest
import torch
from browser import PHONE, check_page, chromium, opened, set_to

from lora_core.quant import quantize
from lora_core.quant.packing import unpack
from lora_core.quant.statistics import level_shares, weight_error

SETTINGS = [
    ("normal", "nf4", 6, 0), ("normal", "fp4", 6, 0), ("normal", "int4", 5, 0), ("laplace", "nf4", 8, 0),
    ("uniform", "int4", 7, 5), ("humps", "fp4", 12, 0), ("normal", "nf4", 10, 20), ("laplace", "int4", 9, 3),
]  # fmt: skip


def check_numbers(page, book, block, nested):
    shown = page.evaluate("({values: shown.values, codes: [...shown.codes], decoded: [...shown.decoded]})")
    weight = torch.tensor(shown["values"])
    held = quantize(weight, quant_type=book, block_size=block, double_quant=False)
    assert shown["codes"] == unpack(held.codes, len(weight)).tolist()
    assert torch.equal(torch.tensor(shown["decoded"]), held.dequantize(torch.float32))
    found, shares = weight_error(weight, held), level_shares(held)
    # shown to so many decimals
    assert abs(float(page.inner_text("#error").rstrip("%")) - 100 * found.relative) <= 0.000501
    assert abs(float(page.inner_text("#snr").split()[0]) - found.snr_db) <= 0.00501
    rarest, commonest = (float(part.rstrip("%")) for part in page.inner_text("#shares").split(", "))
    if book != "fp4":
        assert abs(rarest - 100 * float(shares.min())) <= 0.0501
    assert abs(commonest - 100 * float(shares.max())) <= 0.0501
    bits = quantize(weight, quant_type=book, block_size=block, double_quant=nested).bits_per_parameter
    assert page.inner_text("#bits") == f"{bits:.3f}"


@pytest.mark.browser
def test_nf4_page_quantises_as_the_library_does():
    with chromium() as browser, opened(browser, "nf4.html") as page:
        for i, (shape, book, block, outlier) in enumerate(SETTINGS):
            for control, value in {
                "shape": shape,
                "book": book,
                "block": block,
                "outlier": outlier,
                "nested": i % 2,
            }.items():
                set_to(page, control, value)
            check_numbers(page, book, 2**block, bool(i % 2))


@pytest.mark.browser
def test_nf4_page_ranks_the_codebooks_on_normal_weights_as_they_are():
    errors = {}
    with chromium() as browser, opened(browser, "nf4.html") as page:
        for book in ("nf4", "int4", "fp4"):
            for control, value in {"shape": "normal", "book": book, "block": 6, "outlier": 0}.items():
                set_to(page, control, value)
            errors[book] = float(page.inner_text("#error").rstrip("%"))
    assert errors["nf4"] < errors["int4"] < errors["fp4"]
    # as real Gaussian weights have it, in per cent
    drawn = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    for book, shown in errors.items():
        real = 100 * weight_error(drawn, quantize(drawn, book, 64, double_quant=False)).relative
        assert abs(shown - real) < 0.02 * real


@pytest.mark.browser
def test_nf4_page_follows_a_dragged_distribution_by_mouse_and_keys():
    with chromium() as browser, opened(browser, "nf4.html") as page:
        before = page.inner_text("#error")
        handle = page.locator("#curve circle").nth(3)
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 60, steps=4)
        page.mouse.up()
        dragged = page.inner_text("#error")
        assert page.input_value("#shape") == "own" and dragged != before
        check_numbers(page, "nf4", 64, True)
        raised = float(handle.get_attribute("aria-valuenow"))
        handle.focus()
        page.keyboard.press("ArrowDown")
        assert float(handle.get_attribute("aria-valuenow")) < raised and page.inner_text("#error") != dragged
        check_numbers(page, "nf4", 64, True)
        for key, at in (("End", 1), ("PageDown", 0.8), ("Home", 0)):
            page.keyboard.press(key)
            assert float(handle.get_attribute("aria-valuenow")) == at
        address, last = page.evaluate("location.hash"), page.inner_text("#error")
    with chromium() as browser, opened(browser, "nf4.html", address) as page:
        assert page.inner_text("#error") == last


@pytest.mark.browser
def test_nf4_page_is_dragged_by_a_finger_beside_the_dot_and_keeps_some_density():
    with chromium() as browser, opened(browser, "nf4.html", viewport=PHONE) as page:
        columns, handles = page.locator("#curve .column"), page.locator("#curve circle")
        box = columns.nth(5).bounding_box()
        # 24 CSS pixels, WCAG 2.2 criterion 2.5.8, in one direction; neighbours leave less in the other
        assert box["height"] >= 24 and box["width"] >= 18
        columns.nth(5).click(position={"x": 2, "y": box["height"] / 2})
        assert abs(float(handles.nth(5).get_attribute("aria-valuenow")) - 0.5) < 0.15
        for i in range(handles.count()):
            handles.nth(i).focus()
            page.keyboard.press("Home")
        left = [float(handles.nth(i).get_attribute("aria-valuenow")) for i in range(handles.count())]
        assert sorted(left) == [0.0] * (len(left) - 1) + [0.001] and page.inner_text("#error").endswith("%")


@pytest.mark.browser
def test_nf4_page_works_on_phones_in_the_dark_and_by_keys():
    with chromium() as browser:
        check_page(browser, "nf4.html", "block")
