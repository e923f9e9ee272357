"""The low-rank page: the library's picture, singular values and errors; pictures of the reader's own."""

import pytest
import torch
from browser import check_page, chromium, opened, set_to

from lora_core.reference.low_rank import energy, stored_numbers, truncation_error
from lora_core.reference.picture import picture

# of two decompositions in float64 of a matrix of 64 rows, relative to its largest singular value
ROUNDING = 2.0**-53 * 64 * 64


def number(page, name):
    return float(page.inner_text(f"#{name}").split()[0].rstrip("%").replace(",", ""))


@pytest.mark.browser
def test_low_rank_page_says_what_the_library_says():
    grey = picture(64).double()
    s = torch.linalg.svdvals(grey)
    with chromium() as browser, opened(browser, "low-rank.html") as page:
        assert page.evaluate("[...lowRank.picture(64).grey]") == grey.flatten().tolist()
        found = torch.tensor(page.evaluate("shown.s"), dtype=torch.float64)
        assert ((found - s).abs() <= ROUNDING * s[0]).all()
        for rank in (0, 1, 2, 5, 10, 33, 64):
            set_to(page, "rank", rank)
            assert number(page, "stored") == stored_numbers(64, 64, rank) and number(page, "whole") == 4096
            # shown to three decimals of a percent
            assert abs(number(page, "energy") - 100 * float(energy(s)[rank])) <= 0.000501
            missed = truncation_error(s, rank)
            assert abs(number(page, "error") - 100 * missed / float(grey.norm())) <= 0.000501
            if rank < 30:
                psnr = 10 * torch.tensor(4096 / missed**2).log10()
                assert abs(number(page, "psnr") - float(psnr)) <= 0.00501
        assert page.inner_text("#psnr") == "exact"


@pytest.mark.browser
def test_low_rank_page_takes_a_picture_and_refuses_what_is_none(tmp_path):
    from PIL import Image

    flat, wide = tmp_path / "flat.png", tmp_path / "wide.png"
    Image.new("L", (40, 30), 51).save(flat)
    Image.linear_gradient("L").resize((900, 300)).convert("RGB").save(wide)
    black = tmp_path / "black.png"
    Image.new("L", (20, 10), 0).save(black)
    broken, text = tmp_path / "broken.png", tmp_path / "notes.txt"
    broken.write_bytes(flat.read_bytes()[:40])
    text.write_text("no picture")
    with chromium() as browser, opened(browser, "low-rank.html") as page:
        page.set_input_files("#file", flat)
        page.wait_for_function("shown.rows === 30 && shown.columns === 40")
        # one grey of 0.2 has one singular value, 0.2 sqrt(30 x 40)
        s = page.evaluate("shown.s")
        assert abs(s[0] / (0.2 * 1200**0.5) - 1) <= ROUNDING and max(s[1:]) <= ROUNDING * s[0]
        assert page.get_attribute("#rank", "max") == "30"
        page.set_input_files("#file", wide)
        page.wait_for_function("shown.columns === 160 && shown.rows === 53")
        for path, said in ((broken, "cannot be read as an image"), (text, "is no image")):
            page.set_input_files("#file", path)
            page.wait_for_function(f"document.getElementById('message').textContent.includes('{said}')")
            assert path.name in page.inner_text("#message") and page.evaluate("shown.columns") == 160
        page.set_input_files("#file", black)
        page.wait_for_function("shown.rows === 10")
        assert "NaN" not in page.inner_html("#spectrum") and page.inner_text("#error") == "0.000%"
        page.click("#again")
        assert page.evaluate("shown.columns") == 64 and page.inner_text("#message") == ""


@pytest.mark.browser
def test_low_rank_page_takes_a_dropped_picture():
    drop = """async () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 20, height: 10 });
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        const blob = await new Promise((done) => canvas.toBlob(done));
        const data = new DataTransfer();
        data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
        dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
    }"""
    with chromium() as browser, opened(browser, "low-rank.html") as page:
        page.evaluate(drop)
        page.wait_for_function("shown.rows === 10 && shown.columns === 20")


@pytest.mark.browser
def test_low_rank_page_works_on_phones_in_the_dark_and_by_keys():
    with chromium() as browser:
        check_page(browser, "low-rank.html", "rank")
