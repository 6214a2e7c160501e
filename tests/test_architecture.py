"""Which modules may import which, and what must not happen at import."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Layers of nanochat, from the bottom: packages and top-level modules. A module imports from its own layer and lower
# ones, and there are no import cycles.
LAYERS = (
    "common",
    "distributed device runtime conversation",
    "tokenizer data dataset dataloader cpu sandbox execution reporting report",
    "gpt gpt_config flash_attention loss_head fp8",
    "optim optimizer checkpoint checkpoint_manager inference scaling",
    "engine evals core_eval loss_eval planning train recipe trainer",
    "rl serve formats inspection",
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names.split()}


def modules(folder: str) -> list[Path]:
    """Those that are imported; remote_code is copied into exports and needs transformers."""
    found = (ROOT / folder).rglob("*.py")
    return sorted(p for p in found if p.name != "__init__.py" and p.parent.name != "remote_code")


def imports(path: Path) -> set[str]:
    """Dotted names of everything `path` imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def inner(names: set[str], package: str) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith(package + ".")}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", modules("nanochat"), ids=dotted)
def test_imports_point_down_the_layers(path: Path) -> None:
    names = imports(path)
    own = dotted(path).split(".")[1]
    assert own in LAYER_OF, f"add {own} to LAYERS"
    assert not {n for n in names if n.split(".")[0] in ("tasks", "scripts", "bench")}
    for other in inner(names, "nanochat") & set(LAYER_OF):
        assert LAYER_OF[other] <= LAYER_OF[own], f"{dotted(path)} imports {other}, which is in a higher layer"


def test_no_import_cycle() -> None:
    """Imports inside functions count too."""
    known = {dotted(path): path for folder in ("nanochat", "tasks", "scripts", "bench") for path in modules(folder)}
    graph = {name: imports(path) & set(known) - {name} for name, path in known.items()}
    order = TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the modules


def test_forbidden_imports() -> None:
    def known(name: str) -> set[str]:
        return inner(imports(ROOT / "nanochat" / f"{name}.py"), "nanochat")

    assert not known("gpt") & {"optim", "optimizer", "trainer", "engine"}
    for name in ("trainer", "train/step"):
        assert not known(name) & {"loss_eval", "core_eval", "evals", "engine", "report", "checkpoint_manager"}
        of_data = {n for n in imports(ROOT / "nanochat" / f"{name}.py") if n.startswith("nanochat.data")}
        assert all(n.startswith("nanochat.data.batches") for n in of_data), "a loader's files are its own affair"
    assert not known("engine") & {"checkpoint", "checkpoint_manager", "serve"}


@pytest.mark.parametrize("path", modules("tasks"), ids=lambda p: p.stem)
def test_tasks_import_no_scripts(path: Path) -> None:
    assert not {n for n in imports(path) if n.split(".")[0] == "scripts"}


@pytest.mark.parametrize("path", modules("scripts"), ids=lambda p: p.stem)
def test_no_script_imports_a_script(path: Path) -> None:
    for other in inner(imports(path), "scripts"):
        assert other.startswith("_"), f"{path.stem} imports the script {other}"


def test_only_common_and_runtime_read_the_environment() -> None:
    for path in modules("nanochat") + modules("tasks"):
        text = path.read_text(encoding="utf-8")
        if path.stem != "runtime":
            assert "os.environ" not in text and "getenv" not in text, path


def test_nothing_loads_pickles() -> None:
    for folder in ("nanochat", "tasks", "scripts", "bench"):
        for path in modules(folder):
            names = imports(path)
            assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, path
            assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_imports_have_no_effects() -> None:
    """Importing all modules reads no arguments, creates no folder, initialises no device and opens no socket."""
    paths = [p for folder in ("nanochat", "tasks", "scripts", "bench") for p in modules(folder)]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    code = f"""
import sys, socket, os, importlib
sys.argv = ["x", "--nonsense"]
os.environ["NANOCHAT_BASE_DIR"] = "/nonexistent/never"
def refuse(*a, **k): raise RuntimeError("socket at import")
socket.socket.connect = refuse
import torch
threads = torch.get_num_threads()
for name in {names!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.get_num_threads() == threads and "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
