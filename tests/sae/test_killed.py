# SPDX-License-Identifier: Apache-2.0
"""`kill -9` a few times in every variant; `python tests/sae/killed.py all` does it 20 times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

VARIANTS = ("store", "array", "stream", "start", "live")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments(variant):
    line = [sys.executable, Path(__file__).parent / "killed.py", variant, "--kills", "3"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["kills"] >= 3


def test_every_variant_is_tested():
    text = subprocess.run(
        [sys.executable, Path(__file__).parent / "killed.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "{" + ",".join((*VARIANTS, "all")) + "}" in text
