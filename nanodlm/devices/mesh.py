"""Where arrays live: one mesh with three axes, and rules for what is cut along which.

    data      rows of a batch; each group of devices has all parameters
    fsdp      rows as well, and parameters: each device holds a part, gathered when it is needed
    tensor    heads, feed-forward units and vocabulary of every layer

Any axis may be 1. Source of the scheme: ZeRO, arXiv:1910.02054 (fsdp); Megatron-LM, arXiv:1909.08053 (tensor).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanodlm.errors import UsageError

AXES = ("data", "fsdp", "tensor")
# Numbers on one device at a time. On a CPU that is 256 MiB of float32; a GPU has more, and wants larger products.
LOGITS_AT_ONCE = {"cpu": 2**26, "gpu": 2**28, "tpu": 2**28}


@dataclass(frozen=True)
class Rules:
    """Which mesh axis, or axes, each logical axis of an array is cut along; None is none.

    >>> tuple(Rules().spec(("vocab", "embed")))
    ('tensor', 'fsdp')
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    group: str | None = "data"
    """Rows of all devices that share one copy of the parameters."""
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"

    def spec(self, logical: tuple[str | None, ...]) -> PartitionSpec:
        """The cut of an array whose axes are called so."""
        return PartitionSpec(*(getattr(self, name) if name else None for name in logical))


RULES = Rules()


def make_mesh(rows: int, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes; `data` is what `fsdp` and `tensor` leave.

    Args:
        rows: Rows of a batch, which `data` and `fsdp` share evenly.
        fsdp: Devices that share one copy of the parameters by rows of the matrices.
        tensor: Devices that share the work on each row.

    Raises:
        UsageError: When the devices or the rows cannot be shared so.

    >>> make_mesh(rows=jax.device_count()).axis_names
    ('data', 'fsdp', 'tensor')
    """
    devices = jax.device_count()
    if devices % (fsdp * tensor):
        raise UsageError(
            f"{devices} devices cannot be shared by fsdp {fsdp} and tensor {tensor}, whose product must divide them: "
            "change --train.fsdp or --train.tensor"
        )
    shares = devices // tensor
    if rows % shares:
        raise UsageError(
            f"a batch of {rows} rows cannot be shared by {shares} devices: use a multiple of {shares}, "
            f"such as {-(-rows // shares) * shares}"
        )
    shape = (devices // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, tree: Any, logical_axes: dict[str, tuple[str | None, ...]]) -> Any:
    """Where each array of a tree lives, by the last two names of its path: parameters, averages, optimizer states.

    Args:
        mesh: From `make_mesh`.
        tree: Arrays, or their shapes.
        logical_axes: Names of the last axes, such as `model.LOGICAL_AXES`; what is not listed is held whole.

    Raises:
        UsageError: When an axis cannot be cut evenly.

    >>> mesh = make_mesh(rows=jax.device_count())
    >>> tree = {"qkv": {"kernel": jax.ShapeDtypeStruct((3, 8, 24), "float32")}}
    >>> tuple(shardings(mesh, tree, {"qkv/kernel": ("embed", "heads")})["qkv"]["kernel"].spec)
    (None, 'fsdp', 'tensor')
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path[-2:])
        logical = logical_axes.get(name, ())
        if len(leaf.shape) < len(logical):  # such as the empty places of an optimizer that leaves a parameter alone
            return replicated(mesh)
        spec = PartitionSpec(*(None,) * (len(leaf.shape) - len(logical)), *RULES.spec(logical))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                cut = f"--train.{axis} {mesh.shape[axis]}"
                raise UsageError(
                    f"{name} has {size} along an axis that {cut} cannot cut evenly: use a divisor of {size}"
                )
        return NamedSharding(mesh, spec if logical else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of rows, cut along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES.batch))


def put_whole(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Send rows that every process has, all of them, to the devices."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def logit_chunks(positions: int, outputs: int) -> int:
    """Parts in which the logits of so many positions are made, so that a device holds a bounded number at a time.

    >>> logit_chunks(64, 1000)
    1
    """
    return -(-positions * outputs // (LOGITS_AT_ONCE.get(jax.default_backend(), 2**26) * batch_shares()))


def batch_shares() -> int:
    """Devices that share the rows of a batch, under the mesh that `jax.set_mesh` names; 1 without.

    >>> batch_shares()
    1
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Keep an activation cut along these axes, under the mesh that `jax.set_mesh` names; without one, as it is.

    >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
    (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, RULES.spec(logical))


def bytes_per_device(tree: Any) -> int:
    """The largest part of a tree of arrays, or of shapes that carry shardings, that one device holds.

    >>> bytes_per_device({"a": jax.numpy.ones((4, 2), "float32")})
    32
    """
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
