"""Messages between the processes of a run: one connection each to process 0, JSON lines.

    hello    who I am (at the start); process 0 answers welcome, with who is there or what is wrong
    facts    what must be the same everywhere; process 0 compares them and answers
    ended    I end with this status, for this reason; process 0 passes it on
    bye      I end because all is done

A connection that closes without one of the last two is a process that was lost. Whoever hears of an
end says why in one line and ends with the same status; `LOST` where a process vanished.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping

LOST = 75  # as after a signal: the same command continues from the last checkpoint
GRACE_SECONDS = 2.0  # for a process to end by itself after another one has
_SILENT_SECONDS = 30  # a machine that does not answer for so long is lost
_LONGEST_LINE = 1 << 20


class _Link:
    """Messages over one connection, one JSON object per line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_SILENT_SECONDS)  # to be greeted; see `patient`
        for option, value in (
            (socket.SO_KEEPALIVE, 1),
            (getattr(socket, "TCP_KEEPIDLE", None), _SILENT_SECONDS // 3),
            (getattr(socket, "TCP_KEEPINTVL", None), _SILENT_SECONDS // 6),
            (getattr(socket, "TCP_KEEPCNT", None), 4),
            (getattr(socket, "TCP_USER_TIMEOUT", None), _SILENT_SECONDS * 1000),
        ):
            if option is not None:  # Linux has them all
                level = socket.SOL_SOCKET if option == socket.SO_KEEPALIVE else socket.IPPROTO_TCP
                connection.setsockopt(level, option, value)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()

    def patient(self) -> "_Link":
        """The same without a time limit, once both ends know each other."""
        self._connection.settimeout(None)
        return self

    def send(self, **message) -> None:
        # One that is gone is found by its reader.
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message; None when the connection is closed or speaks something else."""
        try:
            message = json.loads(self._lines.readline(_LONGEST_LINE))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) and "kind" in message else None


class Group:
    """The processes of a run, seen from one of them.

    Attributes:
      index: of this process.
      count: of all.
    """

    def __init__(
        self,
        index: int,
        count: int,
        links: dict[int, _Link],
        hosts: Mapping[int, str],
    ):
        """`links` by process: to all others in process 0, to process 0 in the others."""
        self.index, self.count = index, count
        self._links, self._hosts = links, hosts
        self._facts: queue.Queue[tuple[int, dict]] = queue.Queue()
        self._ended = threading.Event()
        self._reason: tuple[int, str] | None = None
        self._last_word = threading.Lock()  # taken once, by the thread that ends this process
        self._listeners = [
            threading.Thread(target=self._listen, args=(other,), daemon=True) for other in links
        ]
        for listener in self._listeners:
            listener.start()

    def agree(self, facts: Mapping[str, object], value=None):
        """See the functions `agree` and `first_says` of `cluster.py`; returns process 0's value."""
        own = json.loads(json.dumps(dict(facts)))
        if self.index:
            self._links[0].send(kind="facts", facts=own)
            answer = self._next_facts([0])[0]
        else:
            told = {0: own} | self._next_facts(list(self._links))
            answer = {"problem": _difference(told, self._hosts), "value": value}
            for link in self._links.values():
                link.send(kind="facts", facts=answer)
        if answer["problem"]:
            raise ValueError(answer["problem"])
        return answer["value"]

    def _next_facts(self, awaited: list[int]) -> dict[int, dict]:
        found: dict[int, dict] = {}
        while len(found) < len(awaited):
            other, facts = self._facts.get()
            found[other] = facts
        return found

    def end(self, status: int, reason: str) -> None:
        """Says why, tells the others and ends this process.

        Not by `sys.exit`: on the way out JAX would wait minutes for the others.
        """
        self._tell(kind="ended", process=self.index, status=status, reason=reason)
        self._exit(status, reason)

    def _exit(self, status: int, reason: str) -> None:
        self._last_word.acquire()
        sys.stdout.flush()
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if self.index == 0:  # when process 0 goes, JAX aborts the others: they go first
            limit = time.monotonic() + 2 * GRACE_SECONDS
            for listener in self._listeners:
                if listener is not threading.current_thread():
                    listener.join(max(limit - time.monotonic(), 0))
        os._exit(status)

    def leave(self) -> None:
        """Tells the others that this process has done its part."""
        self._tell(kind="bye")
        if self.index:
            self._ended.set()  # nobody's end matters any more

    def why_others_ended(self, seconds: float = _SILENT_SECONDS) -> tuple[int, str] | None:
        """Status and reason of the first other process that ended; waits for the news.

        For an error in a collective, which another's end may have caused.
        """
        self._ended.wait(seconds)
        return self._reason

    def _tell(self, **message) -> None:
        for link in self._links.values():
            link.send(**message)

    def _listen(self, other: int) -> None:
        done = False
        while message := self._links[other].receive():
            if message["kind"] == "facts":
                self._facts.put((other, message["facts"]))
            elif message["kind"] == "ended":
                self._heard(message["process"], message["status"], message["reason"])
            done = done or message["kind"] in ("bye", "ended")
        if not done:
            self._heard(other, LOST, None)

    def _heard(self, other: int, status: int, reason: str | None) -> None:
        if self._ended.is_set():
            return
        if self.index == 0:
            self._tell(kind="ended", process=other, status=status, reason=reason)
        lost = "was lost: killed, or its machine or the network failed"
        how = f"ended with status {status}: {reason}" if reason else lost
        self._reason = status, f"process {other} ({self._hosts[other]}) {how}"
        self._ended.set()
        # This process may be ending by itself for the same reason; but when process 0 is lost JAX
        # aborts the others at once.
        grace = GRACE_SECONDS if other or reason else 0.0
        threading.Thread(target=self._follow, args=(grace,), daemon=True).start()

    def _follow(self, grace: float) -> None:
        time.sleep(grace)
        self._exit(*self._reason)


def connect(host: str, port: int, count: int, index: int, seconds: float) -> Group:
    """Waits until all processes of a run have come.

    Args:
      host: of process 0.
      port: of JAX there; this connection has its own port, 4,096 higher (lower above 61,439).
      count: of processes.
      index: of this one.
      seconds: how long to wait.

    Raises:
      ValueError: in every process, with the ones that did not come in time.
    """
    port += 4096 if port + 4096 < 2**16 else -4096
    limit, own = time.monotonic() + seconds, socket.gethostname()
    if index:
        link = _reach(host, port, limit, seconds)
        link.send(kind="hello", process=index, count=count, host=own)
        link.patient()
        answer = link.receive() or {}
        if "hosts" not in answer:
            raise ValueError(answer.get("problem", f"process 0 ({host}) ended at the start"))
        return Group(index, count, {0: link}, dict(enumerate(answer["hosts"])))
    links, hosts, problem = _receive_all(port, count, limit, seconds)
    hosts[0] = own
    for link in links.values():
        answer = {"problem": problem} if problem else {"hosts": [hosts[i] for i in range(count)]}
        link.send(kind="welcome", **answer)
    if problem:
        raise ValueError(problem)
    return Group(0, count, {i: link.patient() for i, link in links.items()}, hosts)


def _reach(host: str, port: int, limit: float, seconds: float) -> _Link:
    while True:
        try:
            return _Link(socket.create_connection((host.strip("[]"), port), timeout=5))
        except OSError as error:
            if time.monotonic() > limit:
                raise ValueError(
                    f"process 0 does not answer at {host}:{port} after {seconds:g} s ({error}): is "
                    "it started, with this --coordinator_address, and the port open?"
                ) from error
            time.sleep(0.2)


def _receive_all(
    port: int, count: int, limit: float, seconds: float
) -> tuple[dict[int, _Link], dict[int, str], str | None]:
    """Process 0's side of the start: links and hosts of those who came, and what is wrong."""
    links: dict[int, _Link] = {}
    hosts: dict[int, str] = {}
    with _listener(port) as server:
        while len(links) < count - 1:
            server.settimeout(max(limit - time.monotonic(), 0.01))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in links)
                problem = f"of {count} processes these did not come in {seconds:g} s: {missing}"
                return links, hosts, problem
            hello = link.receive() or {}
            if hello.get("kind") != "hello":
                continue  # a stranger: ports are scanned
            process, host = hello["process"], hello["host"]
            if problem := _misfit(process, hello["count"], count, hosts):
                problem = f"process {process} of {hello['count']} ({host}) {problem}"
                link.send(kind="welcome", problem=problem)
                return links, hosts, problem
            links[process], hosts[process] = link, host
    return links, hosts, None


def _misfit(process: int, its_count: int, count: int, hosts: dict[int, str]) -> str | None:
    if its_count != count:
        return f"and process 0 of {count} were started with different --num_processes"
    if process in hosts:
        return f"came a second time: the first is on {hosts[process]}; --process_id must differ"
    return None


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port}, 4,096 from --coordinator_address's "
            f"({error.strerror}): give another address"
        ) from error


def _difference(told: dict[int, dict], hosts: dict[int, str]) -> str | None:
    """What the processes say differently, against process 0; None if nothing."""
    for process, facts in sorted(told.items()):
        differences = [
            f"{name} is {facts.get(name)!r}, not {told[0].get(name)!r}"
            for name in sorted(told[0].keys() | facts.keys())
            if facts.get(name) != told[0].get(name)
        ]
        if differences:
            return (
                f"process {process} ({hosts[process]}) differs from process 0 ({hosts[0]}): "
                f"{'; '.join(differences)}"
            )
    return None
