"""What the kernels log of the ways that operations take."""

import logging

import pytest
import torch


def test_the_debug_log_says_which_path_ran(caplog):
    from lora_core.kernels.lora_linear import launch_lora_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, lora_a, lora_b = (torch.randn(*shape, device=device) for shape in ((2, 3), (4, 3), (1, 3), (4, 1)))
    with caplog.at_level(logging.DEBUG, "lora_core.kernels"):
        launch_lora_linear(x, weight, None, lora_a, lora_b, 1.0, 0.0, None, "fused")
    assert "linear torch.float32 m=2 n=4 k=3 r=1: fused" in caplog.text


@pytest.mark.parametrize(
    ("n", "spread", "said"),
    [(64, False, "words"), (66, False, "bytes"), (64, True, "words, copies 1 operands")],
    ids=["words", "bytes", "copied"],
)
def test_the_debug_log_says_how_codes_are_read_and_what_is_copied(n, spread, said, caplog):
    from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
    from lora_core.kernels.nf4_quantize import launch_nf4_quantize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(n, 2, device=device)[:, 0] if spread else torch.randn(n, device=device)
    with caplog.at_level(logging.DEBUG, "lora_core.kernels"):
        codes, absmax = launch_nf4_quantize(weight, 32)
        loose = codes.repeat_interleave(2, 0)[::2] if spread else codes
        launch_nf4_dequantize(loose, absmax, None, None, (n,), torch.float32, 32)
    said_of = dict(message.split(": ") for message in caplog.messages)
    copied = {"nf4 weight": "made contiguous, copies 1 operands"} if spread else {}
    assert said_of == {"nf4_quantize": said, "nf4_dequantize": said.split(",")[0]} | copied


def test_the_debug_log_says_that_float64_takes_the_reference(caplog):
    from lora_core.kernels.grouped_lora import launch_grouped_lora

    x, lora_a, lora_b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (1, 3), (4, 1)))
    with caplog.at_level(logging.DEBUG, "lora_core.kernels"):
        launch_grouped_lora(x, None, lora_a, lora_b, [1], torch.zeros(2, dtype=torch.int64), torch.ones(1))
    assert "grouped_lora: float64, reference" in caplog.text
