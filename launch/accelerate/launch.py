"""`accelerate launch` or `torchrun` that ends with one readable line and with the exit code of the training processes.

`launch.py ARGUMENTS…` runs accelerate launch, `launch.py torchrun ARGUMENTS…` runs torchrun.

After every stop on request torchrun's agent raises an exception: Python would print its traceback below the trainer's
last line and exit with code 1. `accelerate launch --quiet` does not reach that exception.
"""

import atexit
import logging
import os
import re
import signal
import socket
import sys
import time
from itertools import pairwise
from typing import Any, NoReturn

BAD_INPUT, STOPPED = 2, 75
"""The trainer's exit codes for a mistake of the user, and for "run the same command again"."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that stop a run."""

HEALTHY_SECONDS = 60.0
"""After this time without a failure all restarts of torchrun are available again."""

LOOK_UP_SECONDS = 5.0
"""A name is looked up for this time: the machine may just be starting. torchrun would try for a minute."""

HEAD_SECONDS, NOTE_SECONDS = 60.0, 10.0
"""The rendezvous is tried for the first time, as torchrun does; a note is printed after the second."""

ROUTINE = {
    # Of two agents that end, the one without the store finds it closed.
    "agent.server.api": r"Received \S+ death signal|Got termination signal|Error waiting on exit barrier",
    "multiprocessing.api": r"Sending process \S+ closing signal",
    "rendezvous.dynamic_rendezvous": r"The node '.*' has failed to shutdown the rendezvous",
}
"""Logger below torch.distributed.elastic -> pattern of the warnings that an ordinary end may print."""


def restart_as_the_exit_code_says() -> None:
    """Makes torchrun's agent count only failures as restarts, and end at once after a mistake of the user.

    An agent whose processes were asked to stop, because a machine joins or leaves, starts them again in any case.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    monitor, seen = LocalElasticAgent._monitor_workers, {"processes": None, "since": 0.0}

    def monitor_workers(agent: Any, group: Any) -> Any:
        result = monitor(agent, group)
        codes = {failure.exitcode for failure in result.failures.values()}
        if agent._pcontext is not seen["processes"]:
            seen.update(processes=agent._pcontext, since=time.monotonic())
        if BAD_INPUT in codes:
            agent._remaining_restarts = 0
        elif STOPPED in codes:
            agent._remaining_restarts += 1
        elif not codes and time.monotonic() - seen["since"] > HEALTHY_SECONDS:
            agent._remaining_restarts = group.spec.max_restarts
        return result

    LocalElasticAgent._monitor_workers = monitor_workers


def endpoint() -> str:
    """Returns the address of the rendezvous."""
    words = {option: value for option, value in pairwise(sys.argv) if option == "--rdzv_endpoint"}
    return words.get("--rdzv_endpoint") or os.environ.get("PET_RDZV_ENDPOINT", "")


def wait_for_rendezvous(address: str) -> bool:
    """Waits until the rendezvous can be reached, if another machine holds it; returns whether it can.

    Between two tries Python handles signals. torchrun's own wait would handle none for a minute.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(address, default_port=29400)  # the default of torchrun's c10d
    start, noted = time.monotonic(), False
    while (seconds := time.monotonic() - start) < HEAD_SECONDS:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror:
            if seconds > LOOK_UP_SECONDS:
                return False
        else:
            if any(is_own(family, each) for family, *_, each in found) or accepts(host, port):
                return True
        if seconds > NOTE_SECONDS and not noted:
            noted = True
            print(f"launch: waits for {address}: run the same command there", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return False


def is_own(family: int, address: tuple[Any, ...]) -> bool:
    """Returns whether an address belongs to this machine."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True


def accepts(host: str, port: int) -> bool:
    """Returns whether a process listens at one of the host's addresses."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def report(error: BaseException) -> int:
    """Prints why the launcher ends, unless a training process has printed the reason; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError

    match error:
        case SignalException():
            return STOPPED
        case ChildFailedError():
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            print(f"launch: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return 128 - failure.exitcode
        case RendezvousClosedError():
            print(f"launch: the run at {endpoint()} has ended; a machine cannot join it any more", file=sys.stderr)
            return 1
    return report_lost_head()


def report_lost_head() -> int:
    """Prints what to do if the machine that holds the rendezvous is lost; returns the exit code."""
    advice = "run the same command again on all machines; if that machine is gone, with another HEAD"
    print(f"launch: {endpoint()}, which holds the rendezvous, cannot be reached", file=sys.stderr)
    print(advice, "the run resumes from its last checkpoint", sep="\n", file=sys.stderr)
    return STOPPED


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code, after the exit handlers.

    No object is freed. The thread that tells the rendezvous that this machine lives may still be in a call of the C++
    store, because another agent has ended. If Python freed its objects now, it would wait for that thread, or C++ would
    abort this process ("terminate called without an active exception").
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Runs the launcher with the arguments of this script; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(STOPPED))  # until torchrun handles signals, no process is running
    variable = "TORCH_CPP_LOG_LEVEL"
    own = variable not in os.environ
    if own:
        os.environ[variable] = "FATAL"  # no C++ stack of the store when another agent ends first
    if sys.argv[1:2] == ["torchrun"]:
        del sys.argv[1]
        from torch.distributed.run import main as launch

        restart_as_the_exit_code_says()
    else:
        from accelerate.commands.launch import main as launch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if own:
        del os.environ[variable]  # torch has read it; the training processes keep their warnings
    for name, pattern in ROUTINE.items():
        logger = logging.getLogger(f"torch.distributed.elastic.{name}")
        logger.addFilter(lambda record, pattern=pattern: not re.match(pattern, record.getMessage()))
    sys.tracebacklimit = 0
    if endpoint() and not wait_for_rendezvous(endpoint()):
        return report_lost_head()
    try:
        launch()
    except (SignalException, ChildFailedError, RendezvousError, DistError) as error:
        end_process(report(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
