"""How many parameters each method trains on a model of a given shape.

LoRA       r (N + K) for each adapted linear layer                      Hu et al. 2021, section 4.2
prefix     2 L p d_kv: keys and values of p positions in every layer    Li and Liang 2021, section 4
Houlsby    2 L (2 d m + d + m), and the LayerNorms                      Houlsby et al. 2019, section 2.1
IA3        L (2 d_kv + d_ff): scales of k, v and the hidden activation  Liu et al. 2022, section 3.3
"""

from collections.abc import Iterable

from lora_core.plan.shape import ModelShape
from lora_core.plan.sizes import check_count


def lora_parameters(shape: ModelShape, rank: int, targets: Iterable[str] | str = "all-linear") -> int:
    """Parameters of A and B at every adapted layer.

    Args:
        shape: of the model.
        rank: R.
        targets: as ModelShape.targets takes them.
    Raises:
        ConfigError: if the rank is below 1 or a target is none of the model's.
    """
    check_count("rank", rank)
    return shape.layers * sum(rank * (layer.rows + layer.columns) for layer in shape.targets(targets))


def prefix_parameters(shape: ModelShape, prefix_length: int) -> int:
    """Parameters of the keys and values put before the text, after the network that made them is dropped.

    Raises:
        ConfigError: if the length is below 1.
    """
    check_count("prefix_length", prefix_length)
    return 2 * shape.layers * prefix_length * shape.kv_width


def houlsby_parameters(shape: ModelShape, bottleneck: int, train_norms: bool = True) -> int:
    """Parameters of two adapters a block, each down, up and their biases.

    Args:
        shape: of the model.
        bottleneck: m, the adapters' inner width.
        train_norms: count the blocks' norms, which the method trains as well.
    Raises:
        ConfigError: if the bottleneck is below 1.
    """
    check_count("bottleneck", bottleneck)
    adapter = 2 * shape.hidden * bottleneck + shape.hidden + bottleneck
    return 2 * shape.layers * (adapter + (shape.norm_parameters if train_norms else 0))


def ia3_parameters(shape: ModelShape) -> int:
    """Parameters of the three scaling vectors of every block."""
    return shape.layers * (2 * shape.kv_width + shape.intermediate)
