"""LoRA and rsLoRA: the configuration and the scaling.

    Delta W = s B A,   s = alpha / r  (LoRA)   or   alpha / sqrt(r)  (rsLoRA)

rsLoRA's square root keeps the update from collapsing as r grows. B starts at 0, and its gradient s G^T S, with
S = x A^T and G = dL/dy, holds s: a step of gradient descent lowers the loss by eta s^2 |G^T S|^2, a sum over the r rows
of A, so by s^2 r. With s = alpha / r that vanishes as r grows, with alpha / sqrt(r) it stays. (The first step of Adam
takes the gradient's sign, without s: there it is s r.)

Sources: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732), theorem 3.2.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from lora_core.errors import ConfigError
from lora_core.methods import pissa
from lora_core.methods.expressions import check_expression, compiled_ending, inside_of, layer_number, name_ending
from lora_core.methods.fields import all_of, checks_field_names, is_names
from lora_core.methods.peft_fields import REFUSED, is_harmless
from lora_core.ops.checks import LARGEST

BIASES = ("none", "all", "lora_only")

# beyond the smaller side of any weight: a rank above it adds nothing but memory
LARGEST_RANK = 2**16


@checks_field_names
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how; PEFT's field names and meanings.

    Args:
        r: rank R.
        lora_alpha: alpha; the update is scaled by alpha / r.
        lora_dropout: probability of zeroing an element of x before A, in [0, 1).
        target_modules: name suffixes, a regular expression for whole names, or "all-linear" (every linear layer
            that its module calls, except the output head and the routers of experts).
        exclude_modules: name suffixes, or a regular expression, never adapted.
        bias: "none", "all" (train every bias of the model) or "lora_only" (those of adapted layers).
        use_rslora: scale by alpha / sqrt(r).
        use_dora: weight-decomposed adaptation; not available yet.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal with standard deviation 1/r), False (both
            uniform, so the model changes at once; for tests), "pissa", "pissa_niter_N" (N of at most 100), "olora".
        rank_pattern: {regular expression or name suffix: rank} for single layers; the first that matches counts.
        alpha_pattern: the same for alpha.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the list the indices count in, such as "layers".
        modules_to_save: name suffixes of modules trained whole and saved with the adapter.
        task_type: written for PEFT. With "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" add_adapter has the model's head
            trained whole and saved with the adapter.
        fan_in_fan_out: kept for PEFT; the layer's own type decides here.
        extra: fields of a PEFT configuration that this library keeps and writes back without acting on them.
    Raises:
        ConfigError: on an unknown field (naming the nearest known one) or a value that cannot work.
    """

    HINTS: ClassVar[dict[str, str]] = {
        "rank": "the rank is called 'r'",
        "lora_r": "the rank is called 'r'",
        "alpha": "it is called 'lora_alpha'",
        "dropout": "it is called 'lora_dropout'",
        "inference_mode": "what is trained is chosen when an adapter is added or loaded: is_trainable",
        **dict.fromkeys(REFUSED, "PEFT has it, and it is not implemented here"),
    }

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(
                    f"LoraConfig: the rank of {name!r} is {reprlib.repr(rank)}; want a whole number of at least 1"
                )
            if rank > LARGEST_RANK:
                raise ConfigError(
                    f"LoraConfig: the rank of {name!r} is {reprlib.repr(rank)}; want at most {LARGEST_RANK:,}, more "
                    "than the smaller side of any weight"
                )
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not -LARGEST <= alpha <= LARGEST:
                raise ConfigError(f"LoraConfig: the alpha of {name!r} is {reprlib.repr(alpha)}; want a finite number")
            if alpha <= 0 and str(self.init_lora_weights).startswith("pissa"):
                raise ConfigError(
                    f"LoraConfig: the alpha of {name!r} is {alpha!r}, and init_lora_weights={self.init_lora_weights!r} "
                    "divides by its root: want a positive one"
                )
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"LoraConfig: lora_dropout is {self.lora_dropout!r}; want a probability in [0, 1)")
        if self.bias not in BIASES:
            raise ConfigError(f"LoraConfig: bias is {self.bias!r}; want one of {', '.join(map(repr, BIASES))}")
        if self.use_dora:
            raise ConfigError("LoraConfig: use_dora=True is not available yet; leave it False")
        check_initialisation(self.init_lora_weights)
        self._check_expressions()

    def _check_expressions(self) -> None:
        """Raise ConfigError where what is used as a regular expression is none."""
        for expression in (self.target_modules, self.exclude_modules):
            if isinstance(expression, str):
                check_expression(expression)
        for pattern in map(str, (*self.rank_pattern, *self.alpha_pattern)):
            check_expression(pattern, name_ending(pattern))
        for pattern in _listed(self.layers_pattern):
            check_expression(pattern, layer_number(pattern))
        for name in self.modules_to_save or ():
            check_expression(name, inside_of(name))

    def _check_kinds(self) -> None:
        """Raise ConfigError where a field holds something of another kind than it is for."""
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"LoraConfig: {name} is {getattr(self, name)!r}; want True or False")
        for name, what in (("rank_pattern", "number"), ("alpha_pattern", "number"), ("extra", "value")):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"LoraConfig: {name} is {getattr(self, name)!r}; want a dict of name to {what}")
            if not is_names(getattr(self, name)):
                raise ConfigError(f"LoraConfig: {name} is {getattr(self, name)!r}; want strings for keys")
        changing = next((name for name, value in self.extra.items() if not is_harmless(name, value)), None)
        if changing is not None:
            raise ConfigError(
                f"LoraConfig: extra sets {changing} to {self.extra[changing]!r}, which in PEFT changes what the model "
                "computes and is not implemented here: leave it out"
            )
        if not (self.task_type is None or isinstance(self.task_type, str)):
            raise ConfigError(f"LoraConfig: task_type is {self.task_type!r}; want a string, as 'CAUSAL_LM', or None")
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"LoraConfig: modules_to_save is the string {self.modules_to_save!r}; want a list of names"
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            names = value is None or isinstance(value, str) or is_names(value)
            if not names:
                raise ConfigError(f"LoraConfig: {name} is {value!r}; want names: a list of strings, or one string")
            if name in ("target_modules", "modules_to_save") and not isinstance(value, str) and "" in (value or ()):
                raise ConfigError(f"LoraConfig: {name} is {value!r}, which holds an empty name: leave that out")
            if not isinstance(value, (str, list, tuple, set, frozenset, type(None))):
                # a dict's keys, say: as a list they can be written
                object.__setattr__(self, name, list(value))
        layers = self.layers_to_transform
        if self.layers_pattern and layers is None:
            raise ConfigError(
                f"LoraConfig: layers_pattern is {self.layers_pattern!r} without layers_to_transform, the indices it is "
                "for: set both, or neither"
            )
        if not (layers is None or type(layers) is int or all_of(layers, int)):
            raise ConfigError(f"LoraConfig: layers_to_transform is {layers!r}; want the indices of layers")

    def rank_of(self, module: str) -> int:
        """Return the rank at the module of this name."""
        return self.rank_pattern.get(_pattern_for(self.rank_pattern, module), self.r)

    def scaling_of(self, module: str) -> float:
        """Return s at the module of this name."""
        alpha = self.alpha_pattern.get(_pattern_for(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the fields a PEFT configuration may set."""
        return [f.name for f in fields(cls) if f.name != "extra"]


def check_initialisation(name: bool | str) -> None:
    """Raise ConfigError unless this library can start A and B that way."""
    plain = isinstance(name, bool) or name in ("gaussian", "pissa", "olora")
    if not plain and not (isinstance(name, str) and pissa.is_fast(name)):
        raise ConfigError(
            f"LoraConfig: init_lora_weights is {name!r}; want True, False, 'gaussian', 'pissa', 'pissa_niter_N' with "
            f"N of at most {pissa.MOST_ITERATIONS}, or 'olora'"
        )


def _listed(values: Sequence[str] | str | None) -> Sequence[str]:
    return [values] if isinstance(values, str) else values or ()


def pattern_matches(pattern: str, module: str) -> bool:
    """Say whether a key of rank_pattern or alpha_pattern matches the end of a module's name, as in PEFT."""
    return compiled_ending(pattern).match(module) is not None


def _pattern_for(patterns: dict[str, Any], module: str) -> str:
    """Return the first pattern that matches a module's name, or the name itself."""
    return next((p for p in patterns if pattern_matches(p, module)), module)
