# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import torch

from sidechain import __version__
from sidechain.doctor import doctor_report, format_doctor
from sidechain.ops import backends


def test_report_is_complete_and_serialisable() -> None:
    report = doctor_report()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["sidechain"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["ops"] == backends()
    assert set(report["libraries"]) == {"_C", "_C_cuda", "_host"}
    if report["libraries"]["_C"] is None and report["libraries"]["_host"] is None:
        assert report["isa"]["used"] in report["isa"]["available"]


def test_text_names_every_op_backend_and_reason() -> None:
    report = doctor_report()
    text = format_doctor(report)
    for op, reasons in report["ops"].items():
        for backend, reason in reasons.items():
            (line,) = [row for row in text.splitlines() if row.split()[:2] == [op, backend]]
            assert line.endswith("yes" if reason is None else f"no: {reason}")
    for name, reason in report["libraries"].items():
        assert f"{name} " in text
        assert reason is None or reason in text


def test_report_without_native_code() -> None:
    report = doctor_report() | {"build": {}, "isa": {"available": [], "used": None}}
    assert "none: the reference runs" in format_doctor(report)
