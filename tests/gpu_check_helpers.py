"""Steps for the runner of the GPU check that fail, hang or need each other. Imports no torch: they start at once."""

from pathlib import Path
from typing import Any

from dev.gpu_check_steps import FIRST, Step, last_json

# A hung program whose child has a process group of its own.
HANG = """
import subprocess, sys, time
def hanging():
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
hanging()
"""


def toy_steps(machine: dict[str, Any], out: Path) -> list[Step]:
    def step(name: str, code: str, seconds: float = 0, limit: float = 60, **more: Any) -> Step:
        return Step(name, "toy", ["-c", code], seconds, limit=limit, **more)

    count = f"open({str(out / 'count')!r}, 'a').write('x')"
    return [
        step(FIRST, """print('{"device": "a toy"}')""", figures=last_json()),
        step("fails", "print('some output'); raise SystemExit('error: no such thing')"),
        step("hangs", HANG, limit=2),
        step("needs_it", "", needs=["fails"]),
        step("elsewhere", "", not_here="needs a GPU"),
        step("slow", "", seconds=1000),
        step(
            "counts",
            f"""{count}; print('warning: slow'); print('{{"tokens_per_second": 1234.5}}')""",
            figures=last_json("tokens_per_second"),
        ),
        step("needs_count", "import os; print(os.environ['NANOCHAT_BASE_DIR'])", needs=["counts"]),
        step("no_figures", "print('none')", figures=last_json()),
        step("waits", HANG),
        *([step("of_this_machine", "")] if machine.get("device") == "a toy" else []),
    ]
