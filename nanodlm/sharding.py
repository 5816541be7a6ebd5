"""Where arrays live: one mesh with a `data` axis; batches are cut along it, everything else is on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanodlm.errors import UsageError


def make_mesh(rows: int) -> Mesh:
    """A mesh over all devices.

    Args:
        rows: Rows of a batch, which the devices share evenly.

    Raises:
        UsageError: When they cannot.

    >>> make_mesh(rows=jax.device_count()).axis_names
    ('data',)
    """
    devices = jax.device_count()
    if rows % devices:
        raise UsageError(
            f"a batch of {rows} rows cannot be shared by {devices} devices: use a multiple of {devices}, "
            f"such as {-(-rows // devices) * devices}"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(mesh: Mesh, rows: np.ndarray, axis: int = 0) -> jax.Array:
    """Send rows to the devices, cut along `axis`; each process passes the rows that its devices hold."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return jax.make_array_from_process_local_data(sharding, rows)
