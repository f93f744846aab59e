# SPDX-License-Identifier: Apache-2.0
"""Help: of every command, fast, and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from sidechain import __main__
from sidechain._version import __version__
from sidechain.cli import main as cli

HEAVY = {
    *("torch", "numpy", "pandas", "scipy", "diffusers", "transformers", "matplotlib", "librosa"),
    *("yaml", "safetensors", "tqdm", "jinja2"),
}
CODE = f"""
import sys
from sidechain.cli.main import main
status = main(sys.argv[1:])
loaded = {HEAVY!r} & set(sys.modules)
sys.exit("imported " + " ".join(sorted(loaded)) if loaded else status)
"""
#: The aim is half a second; a test shares its machine with others.
SECONDS = 0.5


def help_of(words: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=False
    )
    return run, time.perf_counter() - start


@pytest.mark.parametrize("command", ["", "sae", *cli.COMMANDS])
def test_help_is_fast_and_imports_nothing_heavy(command):
    fastest = float("inf")
    for _ in range(5):
        run, seconds = help_of([*command.split(), "--help"])
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"usage: sidechain {command}".rstrip())
        fastest = min(fastest, seconds)
        if fastest < SECONDS:
            break
    crowded = os.getloadavg()[0] / (os.cpu_count() or 1)
    assert fastest < SECONDS * max(1.0, crowded)


def test_the_package_alone_imports_nothing_heavy():
    code = f"import sys, sidechain; dir(sidechain); print({HEAVY!r} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n    {command.split()[0]} " in text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sidechain {__version__}\n"


def test_module_runs():
    run = subprocess.run(
        [sys.executable, "-m", "sidechain", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"sidechain {__version__}\n"
    assert __main__.main is cli.main
