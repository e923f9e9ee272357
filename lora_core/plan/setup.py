"""How a model is to be fine-tuned, as far as memory depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.errors import ConfigError
from lora_core.plan.sizes import check_count
from lora_core.quant.blockwise import check_block_size

METHODS = ("full", "lora", "qlora")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to fine-tune.

    Args:
        method: "full", "lora" or "qlora".
        rank: R of the adapters.
        targets: names of the adapted linear layers, "attention" or "all-linear".
        batch: sequences in one forward pass.
        sequence: tokens in each.
        dtype: of the weights and the activations: "bfloat16", "float16" or "float32".
        optimizer: "adamw" (two fp32 states), "adamw_8bit" (two 8-bit ones), "sgd" (none).
        checkpointing: keep each block's input alone and run the block again in the backward pass.
        master_copy: full fine-tuning in half precision updates an fp32 copy of the weights (Micikevicius et al. 2017).
        adapter_bytes: of an adapter's element; add_adapter keeps adapters in fp32.
        block_size: 4-bit weights sharing one scale.
        double_quant: the scales are quantised too.
    Raises:
        ConfigError: on a value that cannot be.
    """

    method: str = "qlora"
    rank: int = 16
    targets: Sequence[str] | str = "all-linear"
    batch: int = 1
    sequence: int = 1024
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    master_copy: bool = True
    adapter_bytes: int = 4
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("dtype", tuple(BYTES)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; want one of {', '.join(known)}")
        for name in ("rank", "batch", "sequence", "adapter_bytes"):
            check_count(name, getattr(self, name))
        for name in ("checkpointing", "master_copy", "double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; want True or False")
        if not isinstance(self.targets, Sequence) or not all(isinstance(name, str) for name in self.targets):
            raise ConfigError(f"targets is {self.targets!r}; want a list of names, 'attention' or 'all-linear'")
        check_block_size("Setup", self.block_size)

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.batch * self.sequence

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return BYTES[self.dtype]

    @property
    def trains_all(self) -> bool:
        """Every weight is trained, not adapters beside them."""
        return self.method == "full"
