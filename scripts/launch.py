"""torchrun with exit codes. Takes torchrun's flags, and forwards stop signals, SLURM's SIGUSR1 too.

    python -m scripts.launch --nproc_per_node=8 --max-restarts=3 -m scripts.base_train -- --depth=24 --resume

When a rank dies or exits with an error, torchrun stops all ranks on all machines and starts them again, up to
--max-restarts times; with --resume they continue from the last complete checkpoint. (--resume-from-step is refused
then: it would take every restart back.) A machine that joins or is lost restarts them too, with the machines there
are. How ranks notice a failure: nanochat/distributed/__init__.py. How a checkpoint stays complete:
nanochat/checkpoint/__init__.py. Several machines: dev/MANY_MACHINES.md.

Exit codes (torchrun's is 1 for any failure):

    0        done
    1        failed: an error of the run, or a collective timed out; the code of the rank that failed first
    2        wrong command
    75       this machine lost the others: run the same command again
    128 + n  stopped by signal n and saved: the same command with --resume continues
"""

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from nanochat.common import UserError
from scripts import _cli

TRY_AGAIN = 75  # EX_TEMPFAIL in sysexits.h
DEFAULTS = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        raise UserError("arguments are torchrun's: --nproc_per_node=2 -m scripts.base_train -- --depth=4")
    try:
        args = run.parse_args([*DEFAULTS, *given])
        if run.config_from_args(args)[0].nproc_per_node < 1:
            raise ValueError("--nproc_per_node must be at least 1")
        if args.module and importlib.util.find_spec(args.training_script) is None:
            raise ValueError(f"there is no module {args.training_script}")
        if args.max_restarts > 0 and any(map(is_going_back, args.training_script_args)):
            raise ValueError("each restart would begin at --resume-from-step again: give --max-restarts=0 with it")
    except (ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(f"{str(error) or 'a number is out of range'}; see --help") from error
    # By default every restart uses the store of the host that had rank 0 at the first start, even if another host has
    # rank 0 now: hosts that stayed and hosts that returned then wait at different stores.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"with exit code {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"killed by {failure.signal_name()}; run the same command with --resume to go on from the last save"
            if -failure.exitcode == signal.SIGABRT:
                how += ". On GPUs, NCCL aborts a rank that waited longer than --timeout for another one"
        print(f"launch: rank {rank} failed first, {how}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except (RendezvousError, dist.DistError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        print(f"launch: this host lost the others, or they have exited ({reason})", file=sys.stderr, flush=True)
        return TRY_AGAIN
    return 0


def is_going_back(word: str) -> bool:
    return word.replace("_", "-").startswith("--resume-from-step")


if __name__ == "__main__":
    _cli.run(main)
