"""The text of a run as token streams on the CPU."""

from dataclasses import dataclass

from torch import Tensor

from lora_core.demo.base import Base
from lora_core.demo.corpus import Corpus, load_corpus
from lora_core.demo.data import token_stream


@dataclass(frozen=True)
class Text:
    """Streams of tokens, int64 [tokens] each, and the documents they come from."""

    code_train: Tensor
    code_held_out: Tensor
    prose_held_out: Tensor
    corpus: Corpus


def load_text(base: Base) -> Text:
    """Encodes what adaptation needs: the prose is only measured on."""
    corpus = load_corpus()
    return Text(
        token_stream(corpus.code.train, base.tokenizer),
        token_stream(corpus.code.held_out, base.tokenizer),
        token_stream(corpus.prose.held_out, base.tokenizer),
        corpus,
    )
