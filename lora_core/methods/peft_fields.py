"""Fields of PEFT's LoraConfig that change what is computed or trained, and that are not implemented here.

Source: PEFT 0.21.2, LoraConfig.
"""

from typing import Any

# name: the values at which the field does nothing
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "ensure_weight_tying": (False, None),
    "enable_lora": (None,),
}


def is_harmless(name: str, value: Any) -> bool:
    """Say whether a field with this value does nothing that is not implemented here."""
    return name not in REFUSED or any(type(value) is type(nothing) and value == nothing for nothing in REFUSED[name])
