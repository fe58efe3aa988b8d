"""torchrun, but for its last words: of an error that a rank has explained itself, no table and no stack trace.

Ends with the exit code of the rank that failed first, for one that a signal ended, or for a signal to torchrun, with a
shell's: 128 and the signal's number.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

EXPLAINED = "gspo-moe: "  # what the ranks' own messages begin with


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with these arguments; the exit code."""
    logging.disable(logging.ERROR)  # the launcher's own, which repeat what it prints at the end
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        if not said.startswith(EXPLAINED):
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
