"""What the backward takes of global memory beside its operands and gradients."""

from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.sm90 import BwdConfig
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100


def has_dq_sums(config: BwdConfig | BwdConfigSm100) -> bool:
    """Whether blocks add to dQ in global memory, in float32."""
    return not (config.passes if isinstance(config, BwdConfigSm100) else config.dq_pass)


def counts_heads(config: BwdConfig | BwdConfigSm100) -> bool:
    """Whether blocks clear and round those sums for each other, and so count how far heads are."""
    return isinstance(config, BwdConfig) and has_dq_sums(config)


def takes_turns(config: BwdConfig | BwdConfigSm100) -> bool:
    """Whether they do so in a fixed order."""
    return config.deterministic and has_dq_sums(config)


def workspace_shapes(
    config: BwdConfig | BwdConfigSm100,
    batch: int,
    q_length: int,
    kv_length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the backward launcher's scratch outputs, in its argument order.

    Where it is summed in global memory, dQ in float32, tile by tile in the order of the registers
    that held it; the log-sum-exp in base 2 and the row sums of dO * O, both padded to whole query
    tiles; where blocks clear and round sums of dQ for each other, what counts how far each
    key/value head is; where blocks take turns, how many have added to each tile's dQ; where blocks
    are in parts, how many of each are done, and its dV and dK in float32.  None needs
    initialising.
    """
    m_blocks = -(-q_length // config.tile_m)
    h = config.padded_head_dim(head_dim)
    rows = (batch, heads, m_blocks * config.tile_m)
    shapes: list[tuple[tuple[int, ...], str]] = [(rows, "float32")] * 2
    if has_dq_sums(config):
        shapes.insert(0, ((batch, heads, m_blocks * config.tile_m * h), "float32"))
    if counts_heads(config):
        shapes.append(((2, batch * kv_heads), "int32"))
    if takes_turns(config):
        shapes.append(((batch, heads, m_blocks * config.dq_warps(head_dim)), "int32"))
    if isinstance(config, BwdConfig) and config.resident_bytes:
        n_blocks = -(-kv_length // config.tile_n)
        width = h + round_up(head_dim_v, 16)
        shapes.append(((batch, kv_heads, n_blocks), "int32"))
        shapes.append(((batch, kv_heads, n_blocks * config.tile_n * width), "float32"))
    return shapes
