"""The shape of a decoder: which weights it has, and how many parameters that makes."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from lora_core.errors import ConfigError
from lora_core.plan.sizes import check_count

ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
GROUPS = ("attention", "all-linear")


@dataclass(frozen=True)
class LinearShape:
    """One linear layer that every block of a model has: y = x W^T + b with W of shape [rows, columns]."""

    name: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """The weight's elements, N K."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's sizes, as its authors published them.

    Args:
        name: what people call it.
        layers: blocks L.
        hidden: width d of the residual stream.
        intermediate: width of the feed-forward layer.
        heads: query heads.
        kv_heads: key and value heads; fewer than heads under grouped-query attention.
        vocabulary: rows of the embedding.
        head_size: width of one head; hidden / heads unless given.
        gated: a gated feed-forward layer (gate, up, down), otherwise two matrices (up, down).
        tied: the output head is the embedding.
        qkv_bias: q, k and v have biases.
        output_bias: o has one.
        biases: every linear layer has a bias, and norms are LayerNorms with one.
        fused: q, k and v are one layer, qkv_proj, as in GPT-2, and so are gate and up, gate_up_proj, as in Phi-3.
        head_norms: one norm for the query heads of a block and one for its key heads, each of the width of a head.
        positions: rows of a learned position embedding; 0 with rotary positions.
        source: where the sizes come from.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int | None = None
    gated: bool = True
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    biases: bool = False
    fused: bool = False
    head_norms: bool = False
    positions: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary"):
            check_count(f"{field} of {self.name!r}", getattr(self, field))
        check_count(f"positions of {self.name!r}", self.positions, least=0)
        if self.head_size is not None:
            check_count(f"head_size of {self.name!r}", self.head_size)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.name!r} has {self.heads} heads and kv_heads {self.kv_heads}; want a divisor of {self.heads}"
            )
        if self.head_size is None and self.hidden % self.heads:
            raise ConfigError(
                f"hidden {self.hidden} of {self.name!r} does not divide by {self.heads} heads; give head_size"
            )

    @property
    def rotary(self) -> bool:
        """Queries and keys are turned by their positions, as none are learned."""
        return not self.positions

    @property
    def head_width(self) -> int:
        """Columns of one head."""
        return self.head_size or self.hidden // self.heads

    @property
    def query_width(self) -> int:
        """Columns of all query heads together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Columns of all key heads together, which is that of the value heads too."""
        return self.kv_heads * self.head_width

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one block, in the order they run."""
        q, kv, inner = self.query_width, self.kv_width, self.intermediate
        attention = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        feed_forward = {"gate_proj": inner, "up_proj": inner} if self.gated else {"up_proj": inner}
        if self.fused:
            attention = {"qkv_proj": q + 2 * kv}
            feed_forward = {"gate_up_proj": 2 * inner} if self.gated else feed_forward
        return (
            *(LinearShape(name, rows, self.hidden, self.qkv_bias or self.biases) for name, rows in attention.items()),
            LinearShape("o_proj", self.hidden, self.query_width, self.output_bias or self.biases),
            *(LinearShape(name, rows, self.hidden, self.biases) for name, rows in feed_forward.items()),
            LinearShape("down_proj", self.hidden, self.intermediate, self.biases),
        )

    def check_sequence(self, sequence: int) -> None:
        """Raises ConfigError if the model has no positions for so many tokens."""
        if self.positions and sequence > self.positions:
            raise ConfigError(
                f"the sequence is {sequence:,} tokens; {self.name} has learned {self.positions:,} positions, and want "
                "no more than that"
            )

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.hidden * (2 if self.biases else 1)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        norms = 2 * self.norm_parameters + 2 * self.head_width * self.head_norms
        block = sum(layer.weights + layer.rows * layer.bias for layer in self.linears) + norms
        tables = self.vocabulary * (1 if self.tied else 2) + self.positions
        return self.layers * block + self.hidden * tables + self.norm_parameters

    @property
    def linear_weights(self) -> int:
        """Elements of all blocks' linear weights, which is what a 4-bit base quantises."""
        return self.layers * sum(layer.weights for layer in self.linears)

    def targets(self, names: Iterable[str] | str) -> tuple[LinearShape, ...]:
        """The linear layers of one block with these names.

        Args:
            names: names, or "all-linear" (all of them), or "attention" (q, k, v and o).
        Raises:
            ConfigError: if a name is none of this model's, with the nearest ones that are.
        """
        known = {layer.name: layer for layer in self.linears}
        if names == "all-linear":
            return self.linears
        if names == "attention":
            names = [name for name in ATTENTION if name in known]
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            raise ConfigError(f"no target module was given; want some of {', '.join(known)}, or 'all-linear'")
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name.lower(), [*known, *GROUPS], n=1, cutoff=0)[0]
                raise ConfigError(
                    f"{self.name} has no linear layer {name!r} in its blocks; did you mean {near!r}? It has "
                    f"{', '.join(known)}; 'attention' and 'all-linear', each alone, name several at once"
                )
        return tuple(layer for layer in self.linears if layer.name in wanted)
