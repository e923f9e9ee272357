"""The LoRA page: counts of real layers, and an adapter that trains as the formulas say."""

import pytest
import torch
from browser import check_page, chromium, opened, set_to

from lora_core.plan.catalogue import find_shape

SIDE = 64


def shown(page):
    found = page.evaluate("shown")
    tensors = {k: torch.tensor(found[k], dtype=torch.float64) for k in ("product", "target", "a", "b", "values")}
    return tensors | {"scaling": found["scaling"], "errors": found["errors"]}


@pytest.mark.browser
def test_lora_page_counts_as_the_plan_does():
    llama = find_shape("Llama-3-8B")
    with chromium() as browser, opened(browser, "lora.html") as page:
        for layer in llama.linears:
            set_to(page, "preset", f"{layer.rows} {layer.columns}")
            for rank in (1, 16, 64):
                set_to(page, "rank", rank)
                assert page.inner_text("#trained") == f"{rank * (layer.rows + layer.columns):,}"
                assert page.inner_text("#dense") == f"{layer.weights:,}"
        for rows, columns, rank, said in (
            (64, 64, 8, ("1,024", "4,096", "4.00x")),
            (4096, 4096, 16, ("131,072", "16,777,216", "128x")),
        ):
            set_to(page, "rows", rows)
            set_to(page, "columns", columns)
            set_to(page, "rank", rank)
            assert page.input_value("#preset") == "own"
            assert tuple(page.inner_text(f"#{name}") for name in ("trained", "dense", "ratio")) == said
        set_to(page, "rank", 64)
        set_to(page, "rows", 8)
        assert "as many numbers as the weight itself" in page.inner_text("#note")


@pytest.mark.browser
def test_lora_page_starts_at_zero_and_trains_to_the_best_of_its_rank():
    with chromium() as browser, opened(browser, "lora.html") as page:
        for rank, alpha, rule in ((8, 16, "r"), (4, 3, "sqrt"), (1, 16, "r")):
            for control, value in {"rank": rank, "alpha": alpha, "rule": rule, "steps": 0}.items():
                set_to(page, control, value)
            start = shown(page)
            s = alpha / rank if rule == "r" else alpha / rank**0.5
            assert (
                start["scaling"] == s and not start["b"].any() and not start["product"].any() and start["errors"] == [1]
            )
            set_to(page, "steps", 200)
            found = shown(page)
            a, b = found["a"].view(rank, SIDE), found["b"].view(SIDE, rank)
            product, target = found["product"].view(SIDE, SIDE), found["target"].view(SIDE, SIDE)
            # the page sums rank products in float64
            assert ((product - s * b @ a).abs() <= 2.0**-53 * (rank + 2) * (s * b.abs() @ a.abs())).all()
            values = torch.linalg.svdvals(product)
            room = 2.0**-53 * SIDE * SIDE * float(values[0])
            assert ((found["values"] - values).abs() <= room).all() and values[rank:].max() <= room
            wanted = torch.linalg.svdvals(target)
            least = float(wanted[rank:].norm() / wanted.norm())
            error = float((product - target).norm() / target.norm())
            assert abs(float(page.inner_text("#least").rstrip("%")) - 100 * least) <= 0.00501
            assert abs(float(page.inner_text("#error").rstrip("%")) - 100 * error) <= 0.00501
            assert least <= error < 1.01 * least and page.inner_text("#note") == ""


@pytest.mark.browser
def test_lora_page_takes_the_step_that_autograd_takes():
    with chromium() as browser, opened(browser, "lora.html") as page:
        set_to(page, "steps", 3)
        before = shown(page)
        set_to(page, "steps", 4)
        after = shown(page)
    s, rank = before["scaling"], 8
    a = before["a"].view(rank, SIDE).requires_grad_()
    b = before["b"].view(SIDE, rank).requires_grad_()
    ((s * b @ a - before["target"].view(SIDE, SIDE)).square().sum() / 2).backward()
    moved_a, moved_b = (after[k].view_as(t) - t.detach() for k, t in (("a", a), ("b", b)))
    rate = float(-(moved_b * b.grad).sum() / b.grad.square().sum())
    for moved, gradient in ((moved_a, a.grad), (moved_b, b.grad)):
        # sums of at most 64 + 64 products, each rounded
        assert ((moved + rate * gradient).abs() <= 2.0**-53 * 256 * (1 + gradient.abs().max())).all()


@pytest.mark.browser
def test_lora_page_shows_what_each_scaling_makes_of_the_rank_at_one_rate():
    """At a rate that stays, higher ranks learn less under alpha/r and more under alpha/sqrt(r)."""
    errors = {}
    with chromium() as browser, opened(browser, "lora.html") as page:
        for control, value in (("steps", 60), ("rate", "0.03"), ("needed", 32)):
            set_to(page, control, value)
        for rule in ("r", "sqrt"):
            set_to(page, "rule", rule)
            for rank in (8, 32, 64):
                set_to(page, "rank", rank)
                assert page.inner_text("#used") == "0.0300"
                errors[rule, rank] = float(page.inner_text("#error").rstrip("%"))
    assert errors["r", 8] < errors["r", 32] < errors["r", 64]
    assert errors["sqrt", 8] > errors["sqrt", 32] > errors["sqrt", 64]


@pytest.mark.browser
def test_lora_page_says_what_it_makes_of_a_size_that_cannot_be():
    with chromium() as browser, opened(browser, "lora.html") as page:
        set_to(page, "rows", 250_000)
        assert page.inner_text("#note") == (
            "rows of W, d out: 250000 counts as 100,000; want a whole number from 1 to 100,000."
        )
        set_to(page, "rows", "")
        assert "nothing counts as 1" in page.inner_text("#note")
        set_to(page, "rows", 4096)
        assert page.inner_text("#note") == ""


@pytest.mark.browser
def test_pages_lead_to_one_another():
    with chromium() as browser, opened(browser, "lora.html") as page:
        for name in ("low-rank", "nf4", "memory", "roofline", "lora"):
            page.click(f"nav a[href='{name}.html']")
            page.wait_for_url(f"**/{name}.html*")
            assert page.get_attribute("nav a[aria-current]", "href") == f"{name}.html"


@pytest.mark.browser
def test_lora_page_works_on_phones_in_the_dark_and_by_keys():
    with chromium() as browser:
        check_page(browser, "lora.html", "rank")
