# SPDX-License-Identifier: Apache-2.0
"""Started by `test_full_disk`: trains on a disk that is full at the n-th call, for every n.

    full_disk_worker.py FOLDER LIBRARY once|always

Leaves one line for each n: what went wrong, or the file that was named.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import re
import sys
from pathlib import Path

import torch

from sidechain.cli import main as cli
from sidechain.store import ActivationWriter

D = 6
ERROR = re.compile(r"sidechain: error: No space left on device: (\S+)")


def main() -> None:
    place, always = Path(sys.argv[1]), sys.argv[3] == "always"
    disk = ctypes.CDLL(sys.argv[2])
    disk.full_disk_calls.restype = ctypes.c_long
    with ActivationWriter(place / "store", {"cross:1": D}) as writer:
        rows = torch.randn(1024, D, generator=torch.Generator().manual_seed(3))
        writer.write({"cross:1": rows}, step=0)
    assert run(place, "whole")[0] == 0
    for number in range(1, 2000):
        out = place / f"{number:04d}"
        out.mkdir()
        disk.full_disk(str(out).encode(), ctypes.c_long(number), int(always))
        code, said = run(place, out.name)
        reached = disk.full_disk_calls() >= number
        disk.full_disk(str(out).encode(), ctypes.c_long(0), 0)
        if not reached:
            break
        print(json.dumps(judge(place, out, code, said, always)), flush=True)
    print(json.dumps({"calls": number - 1}), flush=True)


def run(place: Path, name: str) -> tuple[int, str]:
    said = io.StringIO()
    line = [
        "sae", "train", str(place / "store"), "--features", "16", "--k", "2", "--tokens", "384",
        "--batch", "64", "--set", "log_every=2", "--set", "checkpoint_minutes=0", "--out",
        str(place / name),
    ]  # fmt: skip
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(line)
    return code, said.getvalue()


def judge(place: Path, out: Path, code: int, said: str, always: bool) -> dict[str, str]:
    """Return the file that was named, or what is wrong."""
    found = ERROR.search(said)
    if code == 0:  # what took room was not needed: the signature of the lock
        named = ""
    elif code != 2 or "Traceback" in said or found is None or not said.strip().endswith(found[0]):
        return {"wrong": f"{out.name}: exit {code}: {said[-600:]}"}
    else:
        named = str(Path(found[1]).relative_to(out))
    code, said = run(place, out.name)
    if code != 0:
        return {"wrong": f"{out.name} does not go on after {named}: {said[-600:]}"}
    whole = place / "whole"
    for name in ("sae.safetensors", "run.json"):
        if (out / name).read_bytes() != (whole / name).read_bytes():
            return {"wrong": f"{out.name}: another {name} after {named}"}
    if metrics(out) != metrics(whole):
        return {"wrong": f"{out.name}: other metrics after {named}: {metrics(out)}"}
    left = [str(p) for p in out.rglob("*.part")]
    return {"wrong": f"{out.name}: left over: {left}"} if left else {"named": named}


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


if __name__ == "__main__":
    main()
