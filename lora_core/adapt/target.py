"""Choosing the modules to adapt: name suffixes, a regular expression, or "all-linear". PEFT's rules.

A name matches a list when it is an entry or ends in "." + an entry; it matches a regular expression as a whole.
"""

import re
from typing import Any, cast

from torch import nn

from lora_core.adapt.bypassed import bypassed, bypassed_in_training
from lora_core.adapt.kinds import is_linear
from lora_core.adapt.modules_to_save import TASK_HEADS, lies_in_saved
from lora_core.adapt.names import ALL_LINEAR, matches
from lora_core.adapt.unsupported import gives_several, refuse_unsupported
from lora_core.adapt.untargeted import (
    BYPASSED,
    SEVERAL,
    nothing_found,
    warn_of,
    warn_of_experts,
    warn_of_idle_patterns,
    warn_of_inner,
    warn_of_unmatched,
)
from lora_core.adapt.walk import original_modules, outermost, plain_name, stated_embeddings
from lora_core.errors import ConfigError, TargetNotFoundError
from lora_core.methods.expressions import inside_of, layer_number
from lora_core.methods.lora import LoraConfig

# a smaller table, as one of token types, is no vocabulary, and a classifier as large as it no output head
FEWEST_WORDS = 16


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the modules that config adapts, in the model's order.

    Raises:
        TargetNotFoundError: if none matches, listing names that could, closest first.
        ConfigError: if a module matches that cannot be adapted.
        DtypeError: if its weight is of a dtype that cannot be.
    """
    wanted = config.target_modules
    if wanted is None or len(wanted) == 0:
        raise ConfigError(
            "LoraConfig: target_modules is not set; give name suffixes such as ['q_proj', 'v_proj'], a regular "
            "expression, or 'all-linear'"
        )
    candidates = dict(original_modules(model))
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        head = output_head(model, config.task_type)
        linear = [n for n, m in candidates.items() if is_linear(m) and m is not head and not bypassed(model, n)]
        routers = {n for n in linear if gives_several(candidates[n])}
        warn_of("'all-linear' leaves out", routers, SEVERAL)
        linear = [n for n in linear if n not in routers]
        found = [n for n in linear if not bypassed_in_training(model, n)]
        warn_of("'all-linear' leaves out", set(linear).difference(found), BYPASSED)
    else:
        names = wanted if isinstance(wanted, str) else frozenset(wanted)
        found = [n for n in candidates if matches(plain_name(n), names)]
        warn_of_unmatched("target_modules", wanted, candidates)
        warn_of("an adapter may do nothing at", {n for n in found if bypassed_in_training(model, n)}, BYPASSED)
    warn_of_experts(wanted, candidates)
    found = [n for n in found if not _left_out(plain_name(n), config)]
    found = [n for n in found if _layer_chosen(plain_name(n), config)]
    warn_of_inner(found)
    found = outermost(found)
    warn_of_unmatched("exclude_modules", config.exclude_modules or "", candidates)
    warn_of_idle_patterns(config, found)
    if not found:
        raise TargetNotFoundError(nothing_found(config, candidates))
    for name in found:
        refuse_unsupported(model, name, candidates[name])
    return found


def output_head(model: nn.Module, task_type: str | None = None) -> nn.Module | None:
    """Return the layer that turns hidden states into scores, which "all-linear" leaves out.

    A transformers model says which it is. Elsewhere it is the module called lm_head, or the last linear layer if it
    leads from an embedding's dimension to its vocabulary, of FEWEST_WORDS or more.
    """
    head = stated_embeddings(model, "output")
    if head is not None:
        return head
    if task_type == "SEQ_CLS":
        return next(
            (getattr(model, n) for n in TASK_HEADS[task_type] if isinstance(getattr(model, n, None), nn.Module)), None
        )
    modules = list(original_modules(model))
    linear = [(n, m) for n, m in modules if is_linear(m)]
    for name, module in linear:
        if name.split(".")[-1] == "lm_head":
            return module
    if hasattr(model, "get_output_embeddings"):
        # asked above: a classifier as large as a table of token types is none
        return None
    tables = {m.weight.shape for _, m in modules if isinstance(m, nn.Embedding) and m.num_embeddings >= FEWEST_WORDS}
    last: Any = linear[-1][1] if linear else None
    if last is not None and last.weight.shape in tables:
        return cast(nn.Module, last)
    return None


def _left_out(name: str, config: LoraConfig) -> bool:
    saved = config.modules_to_save or ()
    if any(re.match(inside_of(m), name) for m in saved):
        return True
    if lies_in_saved(name, config):
        return True
    return bool(config.exclude_modules) and matches(name, config.exclude_modules or ())


def _layer_chosen(name: str, config: LoraConfig) -> bool:
    """Apply layers_to_transform: the first number in the name, or the one after layers_pattern.

    Not to a module that target_modules gives by its whole name; and where a list of layers is the model's own child,
    the first number behind another name goes first: both as in PEFT.
    """
    chosen = config.layers_to_transform
    if chosen is None or (not isinstance(chosen, int) and len(chosen) == 0):
        return True
    if not isinstance(config.target_modules, str) and name in (config.target_modules or ()):
        return True
    if config.layers_pattern:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        hits = [re.match(layer_number(p), name) for p in patterns]
    else:
        hits = [re.match(expression, name) for expression in (r".*?\.[^.]*\.(\d+)\.", r"[^.]*\.(\d+)\.")]
    # the pattern may have groups of its own: the number is the last, and of "a|b" only b is before it
    number = next((h[h.re.groups] for h in hits if h), None)
    return number is not None and int(number) in ([chosen] if isinstance(chosen, int) else chosen)
