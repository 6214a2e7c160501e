"""Exit codes of scripts.launch."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import start_script
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from nanochat.common import UserError
from scripts import launch


@pytest.mark.parametrize(("program", "code"), [("exit 0", 0), ("exit 2", 2), ("exit 143", 143), ("kill -ABRT $$", 134)])
def test_exit_code_of_the_program(program: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text(program)
    flags = ["--no-python", "--standalone", "--nproc_per_node=1", f"--log-dir={tmp_path}", "sh", str(path)]
    process = start_script("launch", flags, tmp_path)
    process.join(120)
    said = (tmp_path / "log.txt").read_text()
    assert process.exitcode == code, said
    assert ("launch: rank 0 failed first" in said) == (code > 0)
    assert bool(re.search("SIGABRT.* --resume .*--timeout", said)) == (code == 134)


@pytest.mark.parametrize("error", [RendezvousConnectionError("gone"), dist.DistNetworkError("reset\nat frame 0")])
def test_lost_hosts_exit_75(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(args: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # so that it is unset afterwards
    monkeypatch.setattr(torchrun, "run", lose)
    assert launch.main(["train.py"]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch: ") and f"({str(error).splitlines()[0]})" in line


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--nnodes=abc x.py",
        "--nnodes=3:2 x.py",
        "--nproc_per_node=foo x.py",
        "--nproc_per_node=0 x.py",
        "--rdzv-conf=foo x.py",
        "--max-restarts=-1 x.py",
        "-m scripts.nosuch",
        "--max-restarts=2 -m scripts.base_train -- --resume-from-step=5",
    ],
)
def test_a_wrong_command_is_one_line(argv: str) -> None:
    with pytest.raises(UserError) as error:
        launch.main(argv.split())
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
