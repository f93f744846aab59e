# SPDX-License-Identifier: Apache-2.0
"""The one table of README.md: six figures, each with the file it comes from."""

from __future__ import annotations

from typing import Any

from .files import Results, Run, ours, row
from .markdown import machine, table, times
from .sweeps import AIM, missed

HEAD = ("what", "sidechain", "beside it", "measured on", "file")
SHAPE = "N1024-d768-F12288-k32"
TAP = "capture+steer+renorm-R8-T1025-C1536"
Cells = tuple[str, str]  # ours, and what stands beside it


def section(results: Results) -> list[str]:
    """Heading, table and the way to all other tables."""
    rows = []
    for what, part, op, cells in (
        ("`tap_`: capture + steer + renorm at [8, 1025, 1536], float32", "ops", "tap_", _tap),
        ("`topk_encode`: 1,024 tokens, best 32 of 12,288 features", "sae", "encode", _encode),
        ("Training step of a TopK dictionary, 12,288 features", "sae", "steps", _step),
        ("Memory of such a step, 65,536 features", "sae", "memory", _memory),
        ("Patching sweep of 10 presets, end to end", "sharing", None, _sharing),
        ("`make demo`: localize, steer, report with audio", "demo", None, _demo),
    ):
        run = results.newest(part, op)
        if run is None:
            rows.append([what, "not measured yet", "", "", ""])
        else:
            rows.append([what, *cells(run), machine(run), f"`{run['file']}`"])
    on_gpu = any(run["device"] == "cuda" for run in results.all)
    return [
        "## Measured",
        *table(HEAD, rows),
        "",
        "The files are in `bench/results/`; [bench/RESULTS.md](bench/RESULTS.md) has all tables "
        f"and names the rows that lose.{'' if on_gpu else ' No GPU has been measured yet.'}",
        "",
    ]


def _tap(run: Run) -> Cells:
    native, eager, compiled = (
        _ms(row(run, case=TAP, dtype="f32", provider=name)) for name in ("cpu", "eager", "compile")
    )
    return f"{native:.1f} ms", (
        f"plain torch {eager:.1f} ms ({eager / native:.1f}x), `torch.compile` {compiled:.1f} ms "
        f"({compiled / native:.1f}x)"
    )


def _encode(run: Run) -> Cells:
    case = f"topk-{SHAPE}"
    best = min((r for r in ours(run) if r["case"] == case), key=_ms)
    plain = row(run, case=case, kind="plain")
    return f"{_ms(best):.0f} ms ({best['provider']}, recall {best['facts']['recall']:.4f})", (
        f"linear layer and `topk` {_ms(plain):.0f} ms ({times(best['times_plain'])})"
    )


def _step(run: Run) -> Cells:
    """The default of ours beside dense torch and the fastest package that counts."""
    mine = row(run, case=SHAPE, provider="ours fp32")
    dense = row(run, case=SHAPE, provider="dense fp32")
    peers = [r for r in run["rows"] if r["case"] == SHAPE and r["kind"] == "peer"]
    peer = min((r for r in peers if r["facts"].get("counts") == "yes"), key=_ms)
    name = f"{peer['provider']} {peer['facts'].get('version', '')}".strip()
    return f"{_ms(mine):.0f} ms", (
        f"dense torch {_ms(dense):.0f} ms ({times(dense['facts']['x ours'])}), best package, "
        f"{name}, {_ms(peer):.0f} ms ({times(peer['facts']['x ours'])})"
    )


def _memory(run: Run) -> Cells:
    mine = row(run, provider="ours fp32")["facts"]
    dense = row(run, provider="dense fp32")["facts"]
    return f"{mine['extra_mib']:.0f} MiB", (
        f"dense torch {dense['extra_mib']:.0f} MiB "
        f"({dense['extra_mib'] / mine['extra_mib']:.0f} times as much)"
    )


def _sharing(run: Run) -> Cells:
    case = run["rows"][0]["case"]
    batch, hooks = (row(run, case=case, provider=name) for name in ("shared", "hooks"))
    aim = f"; the aim of {AIM:g}x is missed" if missed(hooks) else ""
    return f"{_ms(batch) / 1000:.1f} s", (
        f"plain hooks, one generation each, {_ms(hooks) / 1000:.1f} s "
        f"({times(hooks['facts']['x shared'])}{aim})"
    )


def _demo(run: Run) -> Cells:
    return f"{_ms(row(run, case='whole')) / 1000:.0f} s", ""


def _ms(found: dict[str, Any]) -> float:
    return float(found["median_us"]) / 1000
