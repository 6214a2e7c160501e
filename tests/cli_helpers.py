"""Run a script's main as its command line does."""

import pytest

from scripts import _cli


def refused(main, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run `main` as from the command line, which must exit with code 2; returns the one line after "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        _cli.run(lambda: main(argv))
    output = capsys.readouterr().err
    assert stop.value.code == 2, output
    lines = [line for line in output.strip().splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0].removeprefix("error: ")
