"""Workers as Ray's actors: on this machine, or on all machines of a cluster that Ray runs on."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from olmfast.cluster.crew import Lost
from olmfast.cluster.worker import Worker
from olmfast.errors import InputError, OlmfastError, told

STORE_BYTES = 512 << 20  # for what workers are sent, where Ray is started for one run


def check_installed() -> None:
    """Raises InputError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("workers: Ray is not installed; pip install 'olmfast[cluster]'")


class RayFleet:
    """See `Fleet`. Each actor has a GPU of its own, or as many of a machine's CPUs as the driver has threads."""

    def __init__(self, n: int | None, address: str | None, device: torch.device) -> None:
        """Join the cluster at an address, or start Ray on this machine for n workers, unless this process is part of a
        cluster; `n` becomes as many as there is room for, where it is None.

        Raises InputError where there is no cluster at the address.
        """
        check_installed()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
        import ray

        self._ray = ray
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        threads, on_gpu = torch.get_num_threads(), device.type == "cuda"
        room = torch.cuda.device_count() if on_gpu else max(1, (os.cpu_count() or 1) // threads)
        quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        self._handles: list[Any] = []
        self._connected = not ray.is_initialized()
        try:
            if not self._connected:  # by whoever called us
                pass
            elif address is None:
                n = n or room
                gpus = {"num_gpus": room} if on_gpu else {}
                ray.init(num_cpus=n * threads, object_store_memory=STORE_BYTES, **gpus, **quiet)
            else:
                del quiet["include_dashboard"]
                ray.init(address=address, **quiet)
        except Exception as error:  # of many types
            where = f"ray.address: {address}" if address else "workers: Ray could not be started on this machine"
            raise InputError(f"{where}: {told(error)}") from error
        if n is None:
            found = ray.cluster_resources()
            n = int(found.get("GPU", 0)) if on_gpu else int(found.get("CPU", 0)) // threads
            if n < 1:
                raise InputError(
                    f"ray.address: {address}: has no {'GPU' if on_gpu else f'{threads} CPUs'} for a worker"
                )
        self.n = n
        self._node = ray.get_runtime_context().get_node_id()
        # A worker that is lost is replaced by us, who know what it has to be told.
        wanted = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": threads}
        self._actor = ray.remote(Worker).options(max_restarts=0, scheduling_strategy="SPREAD", **wanted)

    def start(self) -> Any:
        """See `Fleet.start`."""
        self._handles.append(self._actor.remote())
        return self._handles[-1]

    def ask(self, handle: Any, method: str, *args: Any) -> Any:
        """See `Fleet.ask`."""
        return getattr(handle, method).remote(*args)

    def ready(self, tickets: Sequence[Any], timeout_s: float) -> list[Any]:
        """See `Fleet.ready`."""
        found, _ = self._ray.wait(list(tickets), num_returns=1, timeout=timeout_s)
        if found and len(tickets) > 1:  # others too, if they are there
            found, _ = self._ray.wait(list(tickets), num_returns=len(tickets), timeout=0)
        return list(found)

    def answer(self, ticket: Any) -> Any:
        """See `Fleet.answer`."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ticket)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            raise Lost(_first_line(error)) from error

    def share(self, value: Any) -> Any:
        """See `Fleet.share`."""
        return self._ray.put(value)

    def end(self, handle: Any) -> None:
        """See `Fleet.end`."""
        self._ray.kill(handle)

    def check(self) -> None:
        """See `Fleet.check`: this machine's own part of Ray is needed for all else."""
        try:
            nodes: Sequence[Mapping[str, Any]] = self._ray.nodes()
        except Exception as error:
            raise OlmfastError(self._gone(told(error))) from error
        if not any(node["NodeID"] == self._node and node["Alive"] for node in nodes):
            raise OlmfastError(self._gone("its process on this machine (the raylet) has ended"))

    def _gone(self, why: str) -> str:
        return f"ray: {why}; everything decided so far is saved, --resume continues"

    def close(self) -> None:
        """See `Fleet.close`. A cluster that was there before stays."""
        if self._connected:
            self._ray.shutdown()
            return
        for handle in self._handles:
            self._ray.kill(handle)


def _first_line(error: BaseException) -> str:
    """What Ray says of a worker that is lost, without its advice."""
    for known, short in (("connection error", "its process has ended"), ("owner", "this process's Ray has ended")):
        if known in str(error):
            return short
    return told(error).split(". ")[0]
