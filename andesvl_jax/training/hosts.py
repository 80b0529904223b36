"""Several processes as one run: how they find each other, whose rows are whose, and how all end when one of them is gone."""

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from andesvl_jax.errors import RunEnded, UserError, explained
from andesvl_jax.inputs.packing import Batch
from andesvl_jax.training.sharding import batch_sharding, batch_shards

JOIN_SECONDS = 300  # for all processes to start and meet
HEARTBEAT_SECONDS = 60  # without a sign of life after which a process counts as gone
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AGAIN = "start all processes again with --resume; what was saved before is whole"
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "coordination")  # in what jax raises of a lost process
ENDED = f"the runtime ended this process for the reason above, most likely because another process of the run is gone; {AGAIN}."

# ---- joining and leaving


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins this process to the others of its run, if the environment names any, before jax first sees a device.

    An error inside the block then ends the process at once, with its sentence and exit code: the orderly way would first wait
    for the others, who wait for this one.

    Raises:
      UserError: variables that do not fit together. RunEnded: not all processes came.
    """
    with_others = _join()
    try:
        yield
    except BaseException as error:
        if with_others:
            _leave(error)
        raise


def _join() -> bool:
    """True if this is one of several processes. TPU slices, SLURM steps and Open MPI are found by jax itself."""
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, NUMBER) if os.environ.get(name)}
    if given.get(COUNT) == "1" or (not given and os.environ.get("SLURM_NTASKS") == "1"):
        return False
    place: dict[str, Any] = {}
    if COUNT in given or NUMBER in given:
        count, number = (given.get(name, "") for name in (COUNT, NUMBER))
        if ADDRESS not in given or not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            found = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"environment: found {found}; expected {ADDRESS}=host:port of process 0, {COUNT}=how many and {NUMBER}=0 up to "
                f"one less in every process, or none of them."
            )
        place = {"num_processes": int(count), "process_id": int(number)}
        if not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
            place["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**place, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if not given and "coordinator_address" in str(error):  # jax knows no cluster here
            return False
        raise UserError(f"environment: the other processes of the run cannot be found ({error}).") from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        sentence = f"the processes of the run did not meet within {JOIN_SECONDS} s ({reason}); {AGAIN}."
        raise RunEnded(sentence, RunEnded.TRY_AGAIN) from error
    except RuntimeError:  # devices are in use already: the caller is a program of its own, which has joined or stays alone
        return False
    if jax.process_count() == 1:
        return False
    if jax.default_backend() == "cpu":  # only process 0 may fill the cache: it would be ahead, and gloo waits no more than 30 s
        jax.config.update("jax_enable_compilation_cache", False)
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    return True


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    """Stands where jax aborts the process on learning that another one is gone, for which it has no way to raise."""
    os.write(2, f"\nandesvl: {ENDED}\n".encode())
    os._exit(RunEnded.TRY_AGAIN)


def _leave(error: BaseException) -> None:
    """Says what happened and ends the process; does not return."""
    found = explained(error)
    if found is None and any(mark in str(error) for mark in LOST):
        found = f"{str(error).splitlines()[0]}: most likely another process of the run is gone; {AGAIN}.", RunEnded.TRY_AGAIN
    if found is None:
        traceback.print_exception(error)
        found = f"ended by a {type(error).__name__}.", 1
    sys.stdout.flush()
    print(f"andesvl: process {jax.process_index()}: {found[0]}", file=sys.stderr, flush=True)
    os._exit(found[1])


# ---- while it runs


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Gives the question, to be asked after every step, whether SIGTERM came and this is the step to stop after.

    Among several processes any of them may get the signal, and all are answered True after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda step: False
    else:
        came = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: came.set())
        try:
            yield lambda step: came.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)


def is_first() -> bool:
    """True for the one process that writes what a run leaves behind."""
    return jax.process_index() == 0


def from_all(value: Any) -> list[Any]:
    """The JSON values that all processes give, in their order; each must ask at the same place of the program."""
    if jax.process_count() == 1:
        return [value]
    raw = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array(len(raw), np.int32))
    room = 1 << int(sizes.max()).bit_length()  # few shapes, each compiled once
    rows = multihost_utils.process_allgather(np.frombuffer(raw.ljust(room), np.uint8))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def whole(tree: Any) -> Any:
    """Arrays that are stored in parts as NumPy arrays on the first process, one by one (None on the others)."""
    if jax.process_count() == 1:
        return tree

    def gathered(x: jax.Array) -> np.ndarray | None:
        x = multihost_utils.process_allgather(x, tiled=True)
        return x if is_first() else None

    return jax.tree.map(gathered, tree)


# ---- rows


def data_share(mesh: Mesh | None, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch this process makes, and of how many. Processes that hold parts of the same rows make the same.

    Raises:
      UserError: several processes without a mesh, or a mesh that cuts rows so that the parts would overlap or differ in size.
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise UserError(f"--mesh: found none with {jax.process_count()} processes, expected one, for instance fsdp=-1.")
        return 0, 1
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(batch_shards(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    if sum(map(len, shares)) != batch_shards(mesh) or len(set(map(len, shares))) > 1:
        raise UserError(
            "--mesh: the rows of a batch would lie across processes unevenly, expected data x fsdp and context x tensor to be "
            "multiples or divisors of the devices of a process; choose another --mesh."
        )
    own = tuple(sorted(held[jax.process_index() if process is None else process]))
    return shares.index(own), len(shares)


def on_devices(batches: grain.IterDataset[Batch], mesh: Mesh | None) -> grain.DatasetIterator[tuple[Batch, Batch]]:
    """This process's rows and the whole batch on the devices, the next ones on their way while the last are computed with."""
    _, shares = data_share(mesh)

    def place(batch: Batch) -> tuple[Batch, Batch]:
        if mesh is None:
            return batch, jax.device_put(batch)
        whole_of = lambda x: (len(x) * shares, *x.shape[1:])  # noqa: E731  # rows are whole here, devices take their parts
        rows = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
        return batch, jax.tree.map(lambda x: rows(x, whole_of(x)), batch)

    return iter(grain_experimental.ThreadPrefetchIterDataset(batches.map(place), prefetch_buffer_size=1))
