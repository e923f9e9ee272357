"""Parts of the demo on their own: text that is written, settings, a picture of the page."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_core.demo.page import _picture
from lora_core.demo.sample import write
from lora_core.demo.settings import check_steps, choose_device
from lora_core.errors import ConfigError


class Counting(nn.Module):
    """Writes the number after the last; keeps how many tokens it was shown."""

    def __init__(self):
        super().__init__()
        self.on = nn.Parameter(torch.zeros(()))
        self.shown = []

    def forward(self, tokens):
        self.shown.append(tokens.shape[1])
        return 99.0 * nn.functional.one_hot((tokens + 1) % 10, 10).float()


def test_demo_sample_goes_on_from_the_last_token_within_the_context():
    model = Counting()
    base = SimpleNamespace(config=SimpleNamespace(context=4), tokenizer=SimpleNamespace(decode=list))
    assert write(model, base, [0, 1], 5, 0) == [2, 3, 4, 5, 6]
    assert model.shown == [2, 3, 4, 4, 4]


def test_demo_takes_no_more_steps_than_a_seed_has_room_for():
    check_steps(2**20 - 1)
    with pytest.raises(ConfigError, match="steps is 1048576; want a whole number from 1 to 1048575"):
        check_steps(2**20)


def test_demo_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_demo_picture_is_dark_where_the_reader_wants_it():
    html = _picture(b"light", b"dark", "a chart")
    assert '(prefers-color-scheme: dark)" srcset="data:image/png;base64,ZGFyaw=="' in html
    assert '<img src="data:image/png;base64,bGlnaHQ=" alt="a chart">' in html
