"""This process as a member of Mooncake's stores: it joins one with its first request, and may lend memory."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ragkv.forks import anew_in_forks
from ragkv.store.remote.pool import PoolError, needing

_ADMIN_PORT = 9003


class Member(NamedTuple):
    """How a process takes part in a store.

    Attributes:
        master: its host and port.
        admin: the port of the master that tells what is there.
        host: under which this process is reached; by default the address with which it reaches the master.
        segment: bytes of memory that it lends.
        protocol: ``"tcp"`` or ``"rdma"``.
        device: of RDMA.
        metadata: where members find each other.
    """

    master: tuple[str, int]
    admin: int = _ADMIN_PORT
    host: str = ""
    segment: int = 0
    protocol: str = "tcp"
    device: str = ""
    metadata: str = "P2PHANDSHAKE"


class Members:
    """This process as a member of stores: a client for each, until the process ends. Ending one stops all threads for a second."""

    def __init__(self) -> None:
        self._clients: dict[Member, Any] = {}
        self._parents: list[Any] = []  # which must not end in a child: that would wait for threads that are not there
        self.anew()

    def anew(self) -> None:
        """In a child: none of the parent's."""
        self._parents += self._clients.values()
        self._clients = {}
        self._joining: dict[Member, threading.Lock] = {}

    def client(self, member: Member, limit_s: float) -> Any:
        """The client of a store that was joined now at the latest. Who waits for a slow master waits for that alone.

        Raises:
            PoolError: it cannot be joined.
        """
        if member not in self._clients:
            with self._joining.setdefault(member, threading.Lock()):
                if member not in self._clients:
                    self._clients[member] = _join(member, limit_s)
        return self._clients[member]


def _join(member: Member, limit_s: float) -> Any:
    try:  # the client itself would try for a minute and a half
        with socket.create_connection(member.master, limit_s) as seen:
            host = member.host or seen.getsockname()[0]
    except OSError as error:
        raise PoolError(f"Mooncake's master does not answer: {type(error).__name__}: {error}") from error
    client = client_class()()
    master = ("{}:{}" if ":" not in member.master[0] else "[{}]:{}").format(*member.master)
    code = client.setup(host, member.metadata, member.segment, 0, member.protocol, member.device, master)
    if code:
        raise PoolError(f"Mooncake's store at {master} cannot be joined: error {code}")
    return client


members: Members = anew_in_forks(Members())


def client_class() -> Callable[[], Any]:
    """Mooncake's own client.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needing(
        "Mooncake's store needs its package, and libibverbs1 of the system also without RDMA: pip install 'ragkv[mooncake]', "
        "apt install libibverbs1"
    ):
        from mooncake.store import MooncakeDistributedStore
    made: Callable[[], Any] = MooncakeDistributedStore
    return made
