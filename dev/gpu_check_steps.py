"""The steps of the GPU check, in order of their worth: commands, time limits, and the figures to read from each log."""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST = "environment"  # its figures describe the machine
PARTS = "dev.gpu_check_parts"

Figures = Callable[[str], dict[str, Any]]


def no_figures(text: str) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """One program. `command` is what follows the Python interpreter."""

    name: str
    group: str
    command: Sequence[str]
    seconds: float  # that it usually takes
    figures: Figures = no_figures  # by name, from its output
    needs: Sequence[str] = ()  # steps whose results it uses
    not_here: str = ""  # why it does not apply to this machine
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: float = 0.0  # seconds after which it is killed

    def __post_init__(self) -> None:
        if not self.limit:
            object.__setattr__(self, "limit", 60 + 3 * self.seconds)


# ---------------------------------------------------------------------------------------------------
# Figures


def last_json(*names: str) -> Figures:
    """These values of the JSON object in the last line that is one; all if none are named."""

    def read(text: str) -> dict[str, Any]:
        values = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
        return {name: values[name] for name in names} if names else values

    return read


def test_counts(text: str) -> dict[str, Any]:
    """Tests by outcome, from pytest's verbose lines: those of a run that was ended are there too."""
    outcomes = re.findall(r"^tests/.+? (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.MULTILINE)
    return {f"tests {name.lower()}": outcomes.count(name) for name in dict.fromkeys(outcomes)}


def training(text: str) -> dict[str, Any]:
    """The last speed on the progress line; the rows per micro-batch and their memory, where they were searched."""
    speeds = re.findall(r"([\d.]+)([kMG]?) tok/s", text)
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    figures: dict[str, Any] = {"tokens_per_second": float(speeds[-1][0]) * scale[speeds[-1][1]]} if speeds else {}
    searched = re.search(r"(\d+) rows of \d+ tokens per micro-batch take ([\d.]+) GiB of memory, ([\d.]+) exp", text)
    if searched:
        rows, taken, expected = searched.groups()
        figures |= {"rows": int(rows), "GiB taken": float(taken), "GiB expected": float(expected)}
    return figures


def decoding(text: str) -> dict[str, Any]:
    """Time of a step by rows; tokens a second of the most rows; of the fewest, bandwidth and time without a graph."""
    values = last_json()(text)
    steps = {name: value for name, value in values.items() if re.fullmatch(r"ms_per_step_\d+", name)}
    rows = sorted(int(name.rpartition("_")[2]) for name in steps)
    few, many = rows[0], rows[-1]
    names = (f"tokens_per_second_{many}", f"bandwidth_share_{few}", f"model_without_graph_ms_per_step_{few}")
    return steps | {name: values.get(name) for name in names}


def attention(text: str) -> dict[str, Any]:
    """Forward and backward of one layer, in ms, at the usual context."""
    values = last_json()(text)
    return {f"ms, {kind}": values[f"{kind}_forward_backward_ms_1x"] for kind in ("full", "short", "torch")}


def both(*readers: Figures) -> Figures:
    return lambda text: {name: value for read in readers for name, value in read(text).items()}


TRAINING_BENCH = last_json(
    *("tokens_per_second", "share_of_data_sheet", "share_of_peak", "share_of_forecast", "busy_share"),
    *("peak_memory_bytes", "batch"),
)
UNITS: dict[str, Callable[[Any], str]] = {
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "share_of_data_sheet": "{:.1%} of the data sheet's peak".format,
    "share_of_peak": "{:.1%} of the measured peak".format,
    "share_of_forecast": "{:.0%} of the planner's forecast".format,
    "busy_share": "kernels run {:.0%} of the time".format,
    "peak_memory_bytes": lambda value: f"{value / 2**30:.1f} GiB",
    "batch": "{} rows".format,
    "rows": "{} rows".format,
    "flops_per_second": lambda value: f"{value / 1e12:.1f} TFLOP/s",
    "bytes_per_second": lambda value: f"{value / 1e9:,.0f} GB/s",
}
BY_ROWS: dict[str, Callable[[Any], str]] = {
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "ms_per_step": "{:.2f} ms a step".format,
    "model_without_graph_ms_per_step": "{:.2f} ms without a graph".format,
    "bandwidth_share": "{:.0%} of the bandwidth".format,
}


def figure(name: str, value: Any) -> str:
    """A figure for the table."""
    if name in UNITS:
        return UNITS[name](value)
    by_rows = re.fullmatch(r"(\w+)_(\d+)", name)
    if by_rows and by_rows[1] in BY_ROWS:
        return f"{by_rows[2]} rows: {BY_ROWS[by_rows[1]](value)}"
    if isinstance(value, str):
        return value
    if isinstance(value, list):  # a GPU's capability
        return f"{name} {'.'.join(map(str, value))}"
    if isinstance(value, float):
        return f"{value:.3g} {name}"
    return f"{value:,} {name}" if isinstance(value, int) else f"{name}: {value}"


# ---------------------------------------------------------------------------------------------------
# The steps


CPU_SECONDS = 10.0  # of any step at toy size


@dataclass(frozen=True)
class Sizes:
    """Flags of the toy chain and of the benchmarks."""

    tokenizer: str
    model: str
    train: str
    eval_tokens: int
    sft: str
    rl: str
    ask: str
    cli: str
    bench: str  # of a model as it is trained in earnest
    train_bench: str
    decode_bench: str
    attention_bench: str
    data_bench: str
    depths: Sequence[int]  # of the benchmarks
    depths_that_fit: Sequence[int]  # 12 GiB and 24 GiB


GPU = Sizes(
    tokenizer="--vocab-size=32768",
    model="--depth=4 --max-seq-len=512 --total-batch-size=65536",
    train="--num-iterations=40 --save-every=20",
    eval_tokens=2**18,
    sft="--num-iterations=20 --total-batch-size=65536",
    rl="--num-iterations=3 --eval-examples=16",
    ask="-x 16 -m 64",
    cli="--max-tokens=64",
    bench="--head-dim=128 --seq-len=2048 --vocab-size=32768",
    train_bench="--fit --seconds=4",
    decode_bench="--seconds=2 --rows 1 8 32 128",
    attention_bench="--depth=12 --batch=16 --seconds=1",
    data_bench="--seconds=5",
    depths=(12, 24),
    depths_that_fit=(12, 20),
)
CPU = Sizes(
    tokenizer="--vocab-size=300 --max-chars=50000",
    model="--depth=1 --head-dim=8 --n-embd=16 --max-seq-len=256 --total-batch-size=512",
    train="--num-iterations=4 --save-every=2",
    eval_tokens=512,
    sft="--num-iterations=2 --total-batch-size=256",
    rl="--num-iterations=1 --examples-per-step=2 --num-samples=4 --max-new-tokens=8 --eval-examples=2",
    ask="-x 2 -m 8",
    cli="--max-tokens=8",
    bench="--head-dim=16 --seq-len=64 --vocab-size=300 --seconds=0.02",
    train_bench="--fit --batch=2",
    decode_bench="--prompt=8 --rows 1 8",
    attention_bench="--depth=1 --batch=1",
    data_bench="--batch=2 --chars=20000 --documents=100 --again=20",
    depths=(1,),
    depths_that_fit=(1,),
)


def make_steps(machine: Mapping[str, Any], out: Path) -> list[Step]:
    """The steps for the machine that the first step has found; before that, for one without a GPU."""
    on_gpu = machine.get("device_type") == "cuda"
    size = GPU if on_gpu else CPU
    steps: list[Step] = []

    def add(group: str, name: str, command: str, seconds: float, figures: Figures = no_figures, **more: Any) -> None:
        """`command` follows `python -m`; `seconds` are a GPU's."""
        if not on_gpu:
            seconds = CPU_SECONDS
            more["environment"] = {"OMP_NUM_THREADS": "1", **more.get("environment", {})}  # threads would only wait
        steps.append(Step(name, group, ["-m", *shlex.split(command)], seconds, figures, **more))

    def lacks(gib: float) -> str:
        return f"needs {gib:g} GiB of GPU memory" if on_gpu and machine["memory_gib"] < gib else ""

    pytest = "pytest -vv -rfs --no-header --durations=0 tests/test_on_gpu.py -m"
    tokens = f"--eval-tokens={size.eval_tokens}"
    base = f"scripts.base_train --data=starter {tokens}"
    few = "--num-iterations=6 --eval-every=3"
    rl: dict[str, Any] = {"needs": ["chat_rl"]}
    tok_train: dict[str, Any] = {"needs": ["tok_train"]}
    no_gpu, tested = ("", "") if on_gpu else ("needs a GPU", "on a CPU in tests/ only")

    add("start", FIRST, f"{PARTS} environment", 15, last_json())
    add("start", "imports", f"{PARTS} imports", 20, last_json())
    add("tests", "tests", f"{pytest} 'not compiles'", 90, test_counts)

    add("chain", "tok_train", f"scripts.tok_train --data=starter {size.tokenizer}", 20)
    add("chain", "base_train", f"{base} {size.model} {size.train} --model-tag=check", 45, training, **tok_train)
    add(
        "chain",
        "resume",
        f"{PARTS} resume {base} {size.model} {size.train} --model-tag=resume --deterministic",
        75,
        last_json(),
        **tok_train,
    )
    evaluation = f"scripts.base_eval --data=starter --model-tag=check --split-tokens={size.eval_tokens}"
    add("chain", "base_eval", evaluation, 20, needs=["base_train"])
    sft = f"scripts.chat_sft {tokens} {size.sft}"
    add("chain", "chat_sft", f"{sft} --model-tag=check", 45, training, needs=["base_train"])
    add("chain", "chat_rl", f"scripts.chat_rl --model-tag=check {size.rl}", 45, training, needs=["chat_sft"])
    add("chain", "chat_eval", f"scripts.chat_eval -i rl --model-tag=check {size.ask}", 30, **rl)
    add("chain", "chat_cli", f"scripts.chat_cli -i rl --model-tag=check -p 'What is 12 + 30?' {size.cli}", 15, **rl)
    add("chain", "chat_web", f"{PARTS} web -i rl --model-tag=check", 25, last_json(), **rl)

    def speed(group: str, depth: int, seconds: float, train_gib: float = 0.0, decode_gib: float = 0.0) -> None:
        sizes, profile = f"{size.bench} --depth={depth}", shlex.quote(f"--profile={out / f'train_d{depth}.profile'}")
        train, decode = f"bench.train {size.train_bench} {sizes}", f"bench.decode {size.decode_bench} {sizes}"
        add(group, f"train_d{depth}", f"{train} {profile}", seconds, TRAINING_BENCH, not_here=lacks(train_gib))
        add(group, f"decode_d{depth}", decode, seconds, decoding, not_here=lacks(decode_gib))

    speed("speed", size.depths[0], 60, train_gib=10)
    graphs = f"{PARTS} graphs {base} {size.model} {few} --compile=on --model-tag=graphs"
    add("compile", "graphs", graphs, 60, last_json(), **tok_train)
    graphs = f"{PARTS} graphs {sft} --base-tag=check --compile=on --model-tag=graphs"
    add("compile", "graphs_sft", graphs, 60, last_json(), needs=["base_train"], not_here=tested)
    add("compile", "tests_compiled", f"{pytest} compiles", 150, test_counts, not_here=no_gpu)

    for gib, depth in zip((12, 24), size.depths_that_fit):
        sizes = size.model if not on_gpu else f"--depth={depth} --total-batch-size={2**17}"
        run = f"{PARTS} memory {gib} {base} {sizes} {few} --model-tag=memory_{gib}"
        add("memory", f"memory_{gib}", run, 90, both(training, last_json()), not_here=lacks(gib), **tok_train)

    half = f"{base} {size.model} {few} --model-tag=float16"
    add("more", "float16", half, 45, training, environment={"NANOCHAT_DTYPE": "float16"}, **tok_train)
    fp8 = f"{base} {size.model} {few} --model-tag=fp8 --fp8"
    add("more", "fp8", fp8, 60, training, not_here=machine.get("no_fp8", no_gpu), **tok_train)
    for depth in size.depths[1:]:
        speed("more", depth, 120, train_gib=40, decode_gib=14)
    add("more", "attention", f"bench.attention {size.bench} {size.attention_bench}", 60, attention, not_here=tested)
    data = f"bench.data {size.bench} {size.data_bench}"
    add("more", "data", data, 30, last_json("tokens_per_second"), not_here=tested)
    return steps
