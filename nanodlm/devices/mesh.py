"""Where arrays live: one mesh with three axes, and rules for what is cut along which.

    data      rows of a batch; each group of devices has all parameters
    fsdp      rows as well, and parameters: each device holds a part, gathered when it is needed
    tensor    heads, feed-forward units and vocabulary of every layer

Any axis may be 1. Source of the scheme: ZeRO, arXiv:1910.02054 (fsdp); Megatron-LM, arXiv:1909.08053 (tensor).
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanodlm.errors import UsageError

AXES = ("data", "fsdp", "tensor")
# Numbers on one device at a time. On a CPU that is 256 MiB of float32; a GPU has more, and wants larger products.
LOGITS_AT_ONCE = {"cpu": 2**26, "gpu": 2**28, "tpu": 2**28}
# Where no gradient is made: on a CPU, as many as a cache holds. With one, each part adds to a whole table.
SCORED_AT_ONCE = LOGITS_AT_ONCE | {"cpu": 2**23}

# Along which axes of the mesh each named axis of an array is cut; a group's devices share one copy of the parameters.
RULES = {"batch": ("data", "fsdp"), "group": "data", "embed": "fsdp"}
RULES |= dict.fromkeys(("heads", "mlp", "vocab"), "tensor")

# What the axes of each parameter are, by the last two names of its path; those of blocks have one for layers in front.
# Parameters that are not listed are small and held whole.
LOGICAL_AXES = {
    "embedding/embedding": ("vocab", "embed"),
    "head/embedding": ("vocab", "embed"),
    "qkv/kernel": ("embed", "heads"),
    "attention_out/kernel": ("heads", "embed"),
    "mlp_in/kernel": ("embed", "mlp"),
    "mlp_out/kernel": ("mlp", "embed"),
    "modulation/kernel": ("embed", None),
}


def cut(*logical: str | None) -> PartitionSpec:
    """Return the cut of an array whose axes are called so; None is an axis that every device holds whole.

    >>> tuple(cut("vocab", "embed", None))
    ('tensor', 'fsdp', None)
    """
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def make_mesh(rows: int, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return a mesh over all devices, for batches of so many rows; `data` is what `fsdp` and `tensor` leave."""
    devices = jax.device_count()
    if devices % (fsdp * tensor):
        what = f"{devices} devices cannot be shared by fsdp {fsdp} and tensor {tensor}, whose product must divide them"
        raise UsageError(f"{what}: change --train.fsdp or --train.tensor")
    shares = devices // tensor
    if rows % shares:
        remedy = f"use a multiple of {shares}, such as {-(-rows // shares) * shares}"
        raise UsageError(f"a batch of {rows} rows cannot be shared by {shares} devices: {remedy}")
    return jax.make_mesh((shares // fsdp, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each array, or shape, of a tree, by the last two names of its path.

    Averages and optimizer states end in the names of their parameters, and so are cut like them.

    >>> mesh = make_mesh(rows=jax.device_count())
    >>> tree = {"qkv": {"kernel": jax.ShapeDtypeStruct((3, 8, 24), "float32")}}
    >>> tuple(shardings(mesh, tree)["qkv"]["kernel"].spec)
    (None, 'fsdp', 'tensor')
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path[-2:])
        logical = LOGICAL_AXES.get(name, ())
        if len(leaf.shape) < len(logical) or not logical:  # such as what Muon leaves empty for AdamW's parameters
            return NamedSharding(mesh, cut())
        spec = cut(*(None,) * (len(leaf.shape) - len(logical)), *logical)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                cuts = f"--train.{axis} {mesh.shape[axis]} cannot cut evenly"
                raise UsageError(f"{name} has {size} along an axis that {cuts}: use a divisor of {size}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of rows, cut along `axis`."""
    return NamedSharding(mesh, cut(*[None] * axis, "batch"))


def logit_chunks(positions: int, outputs: int, *, scored: bool = False) -> int:
    """Return in how many parts the logits of so many positions are made, to train or only `scored`.

    That bounds what a device holds at a time.
    """
    at_once = (SCORED_AT_ONCE if scored else LOGITS_AT_ONCE).get(jax.default_backend(), 2**26)
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-positions * outputs // (at_once * shares))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Keep an activation cut along these axes, under the mesh that `jax.set_mesh` names; without one, as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, cut(*logical))
