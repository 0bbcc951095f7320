"""Starts Python processes for tests in milliseconds instead of seconds.

A server process imports torch and this package once and is forked for every process that a test starts: each child has
its own session, environment, working directory and standard streams, as `subprocess` would give it. Use `popen` and
`run` like the functions of these names in `subprocess`; `run_ranks` starts one process per rank, as torchrun does on
one machine. `forked_python` is a program that takes the place of `python`: the processes of launchers and scripts start
as fast with it. A test of what happens before torch is imported uses `subprocess` itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that a child handles as a new Python process does."""


def draw_synthetic_once() -> None:
    """Lets all runs of this process and of its children share the synthetic images: a tiny run is half drawing them."""
    from mnist_dist.data import sources

    drawn = sources.make_synthetic()
    # Copies, because a test may change them.
    sources.make_synthetic = lambda: tuple(
        replace(part, images=part.images.clone(), labels=part.labels.clone()) for part in drawn
    )


# --- the server ---------------------------------------------------------------------------------------------------


FORKED_PYTHON = """\
#!{python} -S
import sys
sys.path.insert(0, {root!r})
from tests.processes import stand_in
stand_in({address!r}, {program!r})
"""


def serve(address: str, client: int) -> None:
    """Forks a child for every request. Returns only in a child, which then runs the request's program.

    Args:
        address: path of the socket, in a folder of its own. The server deletes the folder when it ends.
        client: process id; the server ends soon after this process.
    """
    # Everything that is slow to import. Without this, the first optimizer of each child would import torch._dynamo.
    import psutil
    import torch
    import torch._dynamo
    import torchvision  # noqa: F401

    import mnist_dist.train

    draw_synthetic_once()
    # A child that runs `-m mnist_dist.train` executes only this module again; its imports are already loaded.
    del sys.modules["mnist_dist.train"], mnist_dist.train

    torch.set_num_threads(1)
    # A child's garbage collector would touch, and so copy, all memory that it shares with this process.
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    write_forked_python(address)
    Path(f"{address}.new").rename(address)  # whoever finds the address can connect
    # A child that ends makes `woken` readable.
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    stand_ins: dict[socket.socket, int] = {}
    while True:
        for ready in select.select([listener, woken, *stand_ins], [], [], 1)[0]:
            if ready is woken:
                woken.recv(1 << 16)
            elif ready is listener:
                connection, _ = listener.accept()
                if (received := receive(connection)) is None:
                    continue
                request, streams = received
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its own handlers and streams
                if not (child := os.fork()):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for each in (listener, woken, waker, connection, *children.values()):
                        each.close()
                    become(request, streams)
                    return
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                for stream in streams:
                    os.close(stream)
                children[child] = connection
                if request["program"]:
                    stand_ins[connection] = child
                with suppress(OSError):
                    connection.sendall(f"{child}\n".encode())
            elif ready in stand_ins:
                os.kill(stand_ins.pop(ready), signal.SIGKILL)  # the program that stands for the child was killed
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                break
            connection = children.pop(child)
            stand_ins.pop(connection, None)
            with suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()
        if not psutil.pid_exists(client):
            shutil.rmtree(Path(address).parent, ignore_errors=True)
            os._exit(0)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Returns the request of a client and the descriptors of the child's streams; None if the client is gone."""
    connection.settimeout(60)  # the server must not wait for a client that a test has stopped
    message, streams = b"", []
    while not message.endswith(b"\n"):
        try:
            part, received, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        except OSError:
            part, received = b"", []
        streams += received
        if not part:
            for stream in streams:
                os.close(stream)
            connection.close()
            return None
        message += part
    return json.loads(message), streams


def write_forked_python(address: str) -> None:
    path = Path(address).with_name("python")
    path.write_text(FORKED_PYTHON.format(python=sys.executable, root=str(ROOT), address=address, program=str(path)))
    path.chmod(0o755)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Gives this process the streams, environment, working directory and arguments of the request."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    if encoding := request["env"].get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding)
    if request["env"].get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.argv = request["argv"]
    sys.executable = request["program"] or sys.executable  # a launcher starts its processes with it
    import random

    import torch

    random.seed()
    torch.set_num_threads(int(request["env"].get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def run_program(argv: list[str]) -> None:
    """Runs `-m MODULE …`, `-c SOURCE …` or `SCRIPT …` as the Python interpreter would."""
    import runpy

    sys.argv = argv
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(path for path in sys.path if path not in ("", *paths))]
    if argv[0] == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def end(code: object) -> None:
    """Ends this process with the code of a SystemExit: runs the exit handlers, but frees no memory.

    The normal exit takes longer than most programs of these tests: it destroys every object of torch.
    """
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads, as the interpreter does
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored on flushing sys.stdout: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code or 0)


# --- the client ---------------------------------------------------------------------------------------------------


def _address() -> str:
    """Returns the path of the server's socket. The first call starts the server.

    All processes of xdist share one server, because it takes seconds to start.
    """
    if address := os.environ.get("MNIST_DIST_TEST_SERVER"):
        return address
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same in all processes of xdist
    folder = Path(tempfile.gettempdir()) / f"mnist_dist-tests-{session or uuid.uuid4().hex}"
    address, started = f"{folder}/socket", None
    with suppress(FileExistsError):  # another worker has started it
        folder.mkdir(mode=0o700)
        variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        client = os.getppid() if session else os.getpid()
        command = [sys.executable, "-m", "tests.processes", address, str(client)]
        started = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, start_new_session=True)
    deadline = time.monotonic() + 120
    while not Path(address).exists():
        has_ended = started is not None and started.poll() is not None
        assert not has_ended and time.monotonic() < deadline, "the server of test processes did not start"
        time.sleep(0.02)
    os.environ["MNIST_DIST_TEST_SERVER"] = address
    return address


class Process:
    """A started process, with the attributes and methods of `subprocess.Popen` that tests use."""

    def __init__(self, args: list[str], connection: socket.socket, pid: int, stdout: Any, stderr: Any):
        self.args, self.pid, self.stdout, self.stderr = args, pid, stdout, stderr
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._await(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            answer = self._connection.recv(100)
            self.returncode = int(answer) if answer else -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Reads both streams to their end, then waits for the process.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        found: dict[Any, bytes] = {stream: b"" for stream in (self.stdout, self.stderr) if stream is not None}
        still_open = set(found)
        while still_open:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = select.select(list(still_open), [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for stream in ready:
                content = os.read(stream.fileno(), 1 << 16)
                found[stream] += content
                if not content:
                    still_open.discard(stream)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        out, err = (None if s is None else found[s].decode(errors="replace") for s in (self.stdout, self.stderr))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def popen(
    argv: list[Any],
    *,
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    text: bool = True,
    start_new_session: bool = True,
    program: str = "",
) -> Process:
    """Starts `[sys.executable, "-m", module, …]`, `[sys.executable, "-c", source, …]` or a script. Output is text.

    Args:
        program: path of the `forked_python` that calls this function and stands for the process.
    """
    words = [str(word) for word in argv]
    assert words[0] == sys.executable and text and start_new_session, "processes.popen starts Python only"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address())
    with Path(os.devnull).open("rb") as null:
        close: list[int] = []
        readers: list[IO[str] | None] = []

        def descriptor(stream: Any, number: int) -> int:
            if stream == subprocess.PIPE:
                reader, writer = os.pipe()
                close.append(writer)
                readers.append(os.fdopen(reader, encoding="utf-8", errors="replace"))
                return writer
            readers.append(None)
            if stream == subprocess.DEVNULL:
                close.append(os.open(os.devnull, os.O_WRONLY))
                return close[-1]
            return number if stream is None else stream if isinstance(stream, int) else stream.fileno()

        out = descriptor(stdout, 1)
        err = out if stderr == subprocess.STDOUT else descriptor(stderr, 2)
        if stderr == subprocess.STDOUT:
            readers.append(None)
        source = null.fileno() if stdin in (None, subprocess.DEVNULL) else stdin.fileno()
        request = {
            "argv": words[1:],
            "env": dict(os.environ if env is None else env),
            "cwd": str(Path.cwd() if cwd is None else cwd),
            "program": program,
        }
        request["env"]["PYTHONPATH"] = os.pathsep.join(filter(None, [request["env"].get("PYTHONPATH", ""), str(ROOT)]))
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data[: 1 << 16]], [source, out, err])
        connection.sendall(data[sent:])
        for number in close:
            os.close(number)
    pid = b""
    while not pid.endswith(b"\n"):
        pid += connection.recv(1)
    return Process(words, connection, int(pid), *readers)


def run(
    argv: list[Any],
    *,
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float | None = 300,
    check: bool = False,
    capture_output: bool = True,
    text: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end, as `subprocess.run` does; kills it after `timeout` seconds.

    Raises:
        subprocess.TimeoutExpired, subprocess.CalledProcessError: as `subprocess.run`.
    """
    process = popen(argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode is not None
    done = subprocess.CompletedProcess(process.args, process.returncode, out or "", err or "")
    if check:
        done.check_returncode()
    return done


def forked_python() -> Path:
    """Returns an executable named `python` that runs its program in a child of the server.

    It passes signals on, and ends as the child ends; if it is killed, the child is killed. The child is in the network
    and the namespaces of the server, and does not read the variables that Python or torch read when they start.
    """
    return Path(_address()).with_name("python")


def stand_in(address: str, program: str) -> None:
    """Runs the words of the command line in a child of the server and ends as the child ends."""
    started: list[Process] = []
    early: list[int] = []

    def forward(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(started[0].pid, number) if started else early.append(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    os.environ["MNIST_DIST_TEST_SERVER"] = address
    words = sys.argv[1:]
    if words[0] == "-u":
        os.environ["PYTHONUNBUFFERED"] = "1"
        del words[0]
    process = popen([sys.executable, *words], program=program)
    started.append(process)
    for number in early:
        forward(number, None)
    code = process.wait()
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun gives a rank on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    return {name: str(number) for name, number in numbers.items()} | address


def free_port() -> int:
    """Returns a TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(
    world_size: int,
    argv: list[Any],
    *,
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a Python program once per rank, in one gloo world on this machine; returns what each rank printed.

    Raises:
        AssertionError: a rank did not end with exit code 0; shows the output of all.
        subprocess.TimeoutExpired: after `timeout` seconds; all ranks have been killed.
    """
    port, base = free_port(), dict(os.environ if env is None else env)
    environments = [
        base | {"ACCELERATE_USE_CPU": "true"} | rank_variables(rank, world_size, port) for rank in range(world_size)
    ]
    done = run_in_each(environments, argv, cwd=cwd, timeout=timeout)
    shown = "\n".join(
        f"rank {rank}: exit code {each.returncode}\n{each.stdout}{each.stderr}" for rank, each in enumerate(done)
    )
    assert not any(each.returncode for each in done), shown
    return done


def run_in_each(
    environments: list[dict[str, str]], argv: list[Any], *, cwd: str | Path | None = None, timeout: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a Python program once in each environment, all at the same time; returns how each one ended.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; all processes have been killed.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": cwd}
    started = [popen(argv, env=environment, **pipes) for environment in environments]
    try:
        answers = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *answer)
        for process, answer in zip(started, answers, strict=True)
    ]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
    result: object = None
    try:
        run_program(sys.argv)
    except SystemExit as exit:
        result = exit.code
    end(result)
