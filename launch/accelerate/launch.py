"""`accelerate launch` that ends with one readable line and with the exit code of the training processes.

After every stop on request torchrun's agent raises an exception: Python would print its traceback below the trainer's
last line and exit with code 1. `accelerate launch --quiet` does not reach that exception.
"""

import logging
import os
import signal
import sys

STOPPED = 75
"""The trainer's exit code for "run the same command again"."""

ROUTINE = {
    "agent.server.api": "Received %s death signal",
    "multiprocessing.api": "Sending process %s closing signal",
    # Of two agents that end, the one without the store finds it closed.
    "rendezvous.dynamic_rendezvous": "The node '%s' has failed to shutdown the rendezvous",
}
"""Logger below torch.distributed.elastic -> start of a warning that each ordinary end prints once per process."""


def main() -> int:
    """Runs `accelerate launch` with the arguments of this script; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(STOPPED))  # until torchrun handles signals, no process is running
    variable = "TORCH_CPP_LOG_LEVEL"
    own = variable not in os.environ
    if own:
        os.environ[variable] = "ERROR"  # no C++ stack of the store when another agent ends first
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if own:
        del os.environ[variable]  # torch has read it; the training processes keep their warnings
    for name, start in ROUTINE.items():
        logger = logging.getLogger(f"torch.distributed.elastic.{name}")
        logger.addFilter(lambda record, start=start: not str(record.msg).startswith(start))
    sys.tracebacklimit = 0
    try:
        launch()
    except SignalException:
        return STOPPED  # the training processes have ended, and have printed how
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # the process has printed why
        print(f"launch: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
