"""Commands to show the user: of this run, and of a new run that trains a finished one on."""

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanochat.train.config import HORIZON, TrainConfig


def command_line(script: str, config: Any, **extra: Any) -> str:
    """The command that starts `script` with every non-default field of `config`, and `extra`."""
    defaults = asdict(type(config)())
    flags = {k: v for k, v in {**asdict(config), **extra}.items() if extra.get(k) is not None or v != defaults.get(k)}
    return f"python -m scripts.{script} {describe_flags(flags)}".rstrip()


def gentler_command(script: str, config: TrainConfig) -> str:
    """The command of a fresh run with lower learning rates: the default scale if this run's was above it, else half."""
    name = next(name for name in ("lr_scale", "init_lr_frac") if hasattr(config, name))
    scale, default = getattr(config, name), getattr(type(config), name)
    gentler: Any = {name: default if scale > default else scale / 2, "resume": False, "resume_from_step": -1}
    return command_line(script, replace(config, **gentler))


def describe_flags(flags: Mapping[str, Any]) -> str:
    """The flags as on a command line, quoted where a shell needs it."""
    return shlex.join(flag_words(flags))


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """The flags as the words of a command line, for `subprocess`."""
    words = list[str]()
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def train_on_command(
    script: str, folder: Path, config: TrainConfig, steps: int, asked: Mapping[str, Any] | None = None
) -> str:
    """The command of a new run that starts from the weights of the one in `folder`, which finished after `steps`.

    It has the flags `config` of the finished run, changed by `asked`, the flags given when that was resumed. A longer
    horizon becomes what is left of it: 40 steps after 20 are 20 more.
    """
    new = next(p for n in itertools.count(2) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())
    values, horizon = dict(asked or {}), HORIZON.intersection(asked or {})
    for name in horizon:
        done = steps if name == "num_iterations" else getattr(config, name)
        if values[name] > done > 0:
            values[name] = round(values[name] - done, 6)
    if horizon:
        values = {"num_iterations": -1, "minutes": -1.0} | values
    values |= {"model_tag": new.name, "resume": False, "resume_from_step": -1, **config.start_from(folder.name)}
    return command_line(script, replace(config, **values))
