# SPDX-License-Identifier: Apache-2.0
"""The cases of `sidechain bench ops` under pytest-benchmark: `pytest bench -m bench`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from sidechain.bench import ops
from sidechain.bench.cases import Candidate, Case

CELLS = [
    pytest.param(case, candidate, id=f"{module.OP}-{case.name}-{case.dtype}-{candidate.name}")
    for module in ops.modules()
    for case in module.cases("cpu")
    for candidate in case.candidates
    if candidate.kind != "compiled"
]


@pytest.mark.bench
@pytest.mark.parametrize(("case", "candidate"), CELLS)
def test_op(case: Case, candidate: Candidate, benchmark: Any) -> None:
    benchmark.group = f"{case.name} {case.dtype}"
    with torch.inference_mode(not case.grad):
        case.check(candidate)
        benchmark(partial(candidate.call, case.make(0)))
