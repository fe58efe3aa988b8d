"""torchrun, but for its last words: of an error that a rank has explained itself, no table and no stack trace.

Ends with the exit code of the rank that failed first, for one that a signal ended, or for a signal to torchrun, with a
shell's: 128 and the signal's number.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

EXPLAINED = "gspo-moe: "  # what the ranks' own messages begin with


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with these arguments; the exit code."""
    logging.disable(logging.ERROR)  # the launcher's own, which repeat what it prints at the end
    options = parse_args(list(arguments))
    if options.nproc_per_node == "gpu" and not torch.cuda.is_available():
        build = "is a CPU build" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        print(
            f"torchrun.sh: nvidia-smi lists GPUs, and torch {torch.__version__} sees none: it {build}; run bash "
            "launch/install.sh on this machine, or give --nproc-per-node a number to run on the CPU",
            file=sys.stderr,
        )
        return 2
    try:
        run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
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


def _cause(error: BaseException) -> str:
    """In one line, with the fix."""
    words = " ".join(str(one) for one in (error, error.__cause__, error.__context__) if one is not None)
    if "EADDRINUSE" in words or "ddress already in use" in words:
        return "that port is in use on this host; end what has it, or give another one on every host"
    first = str(error.__cause__ or error).splitlines()[0]
    return f"the hosts do not meet there ({first}); give HOST:PORT of one of them, the same on every host"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
