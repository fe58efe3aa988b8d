"""torchrun that ends as its ranks do: signals are theirs to act upon, and errors that they explained are not repeated.

Ends with the exit code of the rank that failed first, with a shell's (128 and the signal's number) for one that a
signal ended. SIGTERM, SIGINT and SIGUSR1 are handed on, and what the ranks make of them is the end; torchrun's own way
with them is to end with a stack trace, whatever the ranks did.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters

EXPLAINED = "gspo-moe: "  # what the ranks' own messages begin with
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"
LAUNCHER = "GSPO_MOE_LAUNCHER"  # tells the ranks whom not to outlive
WAITING_SECONDS = 15.0  # for other hosts, before that is said, and said again
STDERR = 2


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with these arguments; the exit code."""
    received = _hand_signals_on()
    # Here, not above: this takes a second, in which a signal may come.
    import torch
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.ERROR)  # the launcher's own, which repeat what it prints at the end
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    if options.nproc_per_node == "gpu" and not torch.cuda.is_available():
        build = "is a CPU build" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        print(
            f"torchrun.sh: nvidia-smi lists GPUs, and torch {torch.__version__} sees none: it {build}; run bash "
            "launch/install.sh on this machine, or give --nproc-per-node a number to run on the CPU",
            file=sys.stderr,
        )
        return 2
    options.signals_to_handle = LEFT_TO_TORCHRUN
    os.environ[LAUNCHER] = str(os.getpid())
    if options.max_restarts:
        # A shared store still holds what the ranks before the restart wrote, and the new ones never meet.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if not options.standalone:
        _tell_of_absent_hosts(options.nnodes, options.rdzv_endpoint)
    try:
        run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if -failure.exitcode in received:
            name, early = signal.Signals(-failure.exitcode).name, len(received) == 1
            what = "came before there was a run to save" if early else "came twice, and ended the ranks at once"
            print(f"torchrun.sh: {name} {what}", file=sys.stderr)
            return 0 if early else 128 - failure.exitcode
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        if not said.startswith(EXPLAINED):
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (DistNetworkError, RendezvousError) as error:
        print(f"torchrun.sh: --rdzv-endpoint {options.rdzv_endpoint}: {_cause(error)}", file=sys.stderr)
        return 2
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _refuse(message: str) -> NoReturn:
    print(f"torchrun.sh: {message}; options are launch/torchrun.sh's own (--help) and torchrun's", file=sys.stderr)
    sys.exit(2)


def _hand_signals_on() -> list[int]:
    """Sends this process's signals to its ranks; filled with those that came. Without ranks the process ends."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        ranks = psutil.Process().children()
        if not ranks:
            os.write(STDERR, f"torchrun.sh: {signal.Signals(number).name} ends it: no rank runs here\n".encode())
            os._exit(0)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for each in HANDED_ON:
        signal.signal(each, hand_on)
    return received


def _tell_of_absent_hosts(nodes: str, endpoint: str) -> None:
    """Says every now and then who is there, until the ranks start."""
    from torch.distributed.elastic.rendezvous import registry

    handlers: list[RendezvousHandler] = []
    make = registry.get_rendezvous_handler

    def kept(parameters: RendezvousParameters) -> RendezvousHandler:
        handlers.append(make(parameters))
        return handlers[-1]

    def tell() -> None:
        begun = time.monotonic()
        while True:
            time.sleep(WAITING_SECONDS)
            if psutil.Process().children():
                return
            # torch shows its state to nobody; a version that keeps it elsewhere leaves the names out.
            state = getattr(getattr(handlers[-1] if handlers else None, "_state_holder", None), "state", None)
            here = sorted(one.addr for one in getattr(state, "participants", ()))
            there = f"{len(here)} there ({', '.join(here)})" if here else "no other was seen yet"
            print(
                f"torchrun.sh: after {time.monotonic() - begun:.0f} s still waiting for {nodes} hosts to meet at "
                f"{endpoint}: {there}; start the same command on those that are absent",
                file=sys.stderr,
                flush=True,
            )

    registry.get_rendezvous_handler = kept
    threading.Thread(target=tell, daemon=True).start()


def _cause(error: BaseException) -> str:
    """In one line, with the fix."""
    words = " ".join(str(one) for one in (error, error.__cause__, error.__context__) if one is not None)
    if "EADDRINUSE" in words or "ddress already in use" in words:
        return "that port is in use on this host; end what has it, or give another one on every host"
    first = str(error.__cause__ or error).splitlines()[0]
    return f"the hosts do not meet there ({first}); give HOST:PORT of one of them, the same on every host"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
