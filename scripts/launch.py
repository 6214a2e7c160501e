"""torchrun for machines that come and go. It takes what torchrun takes.

    python -m scripts.launch --nproc_per_node=8 -m scripts.base_train -- --depth=24 --resume

Whatever happened, torchrun ends with 1. This ends with the code of the process that failed first: 2 for a wrong
command, 128 + the signal's number for a run that was told to stop, which is saved and wants to be started again. 75
means that the machines have lost each other: the same command is to be tried again. SIGUSR1, SLURM's, is handed on too.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from nanochat.common import UserError
from scripts import _cli

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
DEFAULTS = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        raise UserError("give what torchrun takes: --nproc_per_node=2 -m scripts.base_train -- --depth=4")
    try:
        args = run.parse_args([*DEFAULTS, *given])
        if run.config_from_args(args)[0].nproc_per_node < 1:
            raise ValueError("--nproc_per_node must be at least 1")
        if args.module and importlib.util.find_spec(args.training_script) is None:
            raise ValueError(f"there is no module {args.training_script}")
    except (ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(f"{str(error) or 'a number is out of range'}; see --help") from error
    # By default every start uses the store of the host that was first at the first one, also when another host has
    # come to be the first meanwhile: hosts that stayed then wait at another place than hosts that returned.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"launch: rank {rank} failed first, with exit code {failure.exitcode}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # killed by that signal
    except SignalException as stop:
        return 128 + stop.sigval
    except (RendezvousError, dist.DistError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        print(f"launch: this host has lost the others, or they have ended ({reason})", file=sys.stderr, flush=True)
        return TRY_AGAIN
    return 0


if __name__ == "__main__":
    _cli.run(main)
