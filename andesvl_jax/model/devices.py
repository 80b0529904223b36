"""The devices that a program under trace is compiled for. They come from the mesh in context: an ahead-of-time compile for a
TPU runs on a machine whose own backend is a CPU."""

from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import Mesh

ROW_AXES = ("data", "fsdp")  # mesh axes that cut the rows of a batch
HEAD_AXES = ("tensor",)  # mesh axes that cut attention heads


def compiled_for(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which the network is traced for the devices of `mesh`; None leaves them to the caller."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context (`compiled_for`, `jax.set_mesh`), without one of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
