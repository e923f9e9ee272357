"""Byte-pair encoding: frequent neighbours become one token, and any text can be spelled out in bytes."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_core.errors import CheckpointError

# a word with the space before it, one digit, a run of marks, a line break with its indentation, other white space
WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+ *|\s")
BYTES = 256
# stands before every document; no text encodes to it
SEPARATOR = BYTES


class Tokenizer:
    """Tokens 0..255 are the bytes, 256 separates documents, token 257 + i joins the two tokens of merge i."""

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        """Builds the vocabulary of a list of merges, in the order they were learned."""
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: SEPARATOR + 1 + index for index, pair in enumerate(self.merges)}
        self.spelling = [bytes([byte]) for byte in range(BYTES)] + [b""]
        for left, right in self.merges:
            self.spelling.append(self.spelling[left] + self.spelling[right])
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.spelling)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        tokens: list[int] = []
        for word in WORD.findall(text):
            if word not in self._known:
                self._known[word] = self._encode_word(word)
            tokens.extend(self._known[word])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 show as a replacement character."""
        return b"".join(self.spelling[token] for token in tokens).decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> list[int]:
        """Joins the pair that was learned first, until no known pair is left."""
        tokens = list(word.encode(errors="replace"))
        while len(tokens) > 1:
            best = min(zip(tokens, tokens[1:], strict=False), key=lambda pair: self.rank.get(pair, len(self)))
            if best not in self.rank:
                break
            tokens = _join(tokens, best, self.rank[best])
        return tokens

    def save(self, path: Path) -> None:
        """Writes the merges as JSON."""
        path.write_text(json.dumps({"kind": "byte-pair", "merges": self.merges}, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads what `save` wrote."""
        try:
            return cls([(left, right) for left, right in json.loads(path.read_text())["merges"]])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{path} is not a tokenizer of this demo ({error}); make one with: lora-core demo --pretrain"
            ) from error


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learns merges until the vocabulary is full; the most frequent pair first, ties by the pair's numbers.

    Args:
        documents: text to count.
        vocabulary: number of tokens wanted, at least 257.
    Returns:
        A tokenizer; equal documents give equal merges.
    Source: Sennrich et al. 2016, algorithm 1, with counts kept up to date instead of recounted.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(WORD.findall(document))
    words = [list(word.encode(errors="replace")) for word in counts]
    weights = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    found_in: dict[tuple[int, int], set[int]] = defaultdict(set)

    def tally(index: int, sign: int) -> None:
        for pair in zip(words[index], words[index][1:], strict=False):
            pairs[pair] += sign * weights[index]
            if sign > 0:
                found_in[pair].add(index)

    for index in range(len(words)):
        tally(index, 1)
    merges: list[tuple[int, int]] = []
    while SEPARATOR + 1 + len(merges) < vocabulary and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        for index in sorted(found_in[best]):
            tally(index, -1)
            words[index] = _join(words[index], best, SEPARATOR + 1 + len(merges))
            tally(index, 1)
        del pairs[best], found_in[best]
        merges.append(best)
    return Tokenizer(merges)


def _join(tokens: list[int], pair: tuple[int, int], joined: int) -> list[int]:
    """The tokens with every occurrence of the pair replaced, from the left."""
    result, index = [], 0
    while index < len(tokens):
        if index + 1 < len(tokens) and (tokens[index], tokens[index + 1]) == pair:
            result.append(joined)
            index += 2
        else:
            result.append(tokens[index])
            index += 1
    return result
