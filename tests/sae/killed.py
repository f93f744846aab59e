# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of a training at random moments, until it comes through; then it is compared.

    python tests/sae/killed.py VARIANT|all [--kills 20] [--seed 0]

A variant is a function that trains in a folder. The processes are forks, which have everything
imported: most of the time they live they train and save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sae.oracle import planted
from sidechain.sae import PipelineSource, Sae, SaeConfig, formats, train
from sidechain.store import ActivationStore, ActivationWriter
from sidechain.testing import tiny_pipeline

D, N, EVERY = 24, 64, 4
SETTINGS = dict(
    features=96, k=4, batch=N, lr=3e-3, log_every=EVERY, checkpoint_minutes=0.0, progress=False,
    aux_k=8, dead_tokens=3 * N, dead_every=7,
)  # fmt: skip


def rows() -> torch.Tensor:
    return planted(6000, D, seed=5)[0]


def store(place: Path, out: Path) -> None:
    """Rows of a store, of three steps, over and over."""
    folder = place / "store"
    if not folder.exists():
        with ActivationWriter(folder, {"cross:1": D}) as writer:
            for step, scale in enumerate((8.0, 2.0, 0.5)):
                writer.write({"cross:1": rows()[step::3] * scale + step}, step=step)
    train(ActivationStore(folder, "cross:1"), out, tokens=N * 160, **SETTINGS)


def array(place: Path, out: Path) -> None:
    """A memory-mapped file, two epochs, with rows that are not finite and are left out."""
    path = place / "acts.npy"
    if not path.exists():
        found = rows().numpy()
        found[[7, 1700, 4200]] = np.nan
        np.save(path, found)
    steps = np.arange(6000) % 3
    train(path, out, steps=steps, epochs=2, on_bad_rows="skip", held_out=0.1, **SETTINGS)


def stream(place: Path, out: Path) -> None:
    """Tensors with steps as they come, shuffled in a buffer, passed over when the run goes on."""
    items = [(part, number % 3) for number, part in enumerate(rows().split(100))]
    settings = {**SETTINGS, "architecture": "jumprelu", "k": None}
    train(lambda: iter(items), out, tokens=N * 88, buffer=1000, **settings)


def start(place: Path, out: Path) -> None:
    """From a dictionary in the format of another library, grown, by the autograd step."""
    folder = place / "theirs"
    if not folder.exists():
        formats.save(Sae(SaeConfig(D, 64, "topk", k=4), seed=1), folder, "sparsify")
    settings = {name: value for name, value in SETTINGS.items() if name != "features"}
    train(
        rows(), out, start=folder, tokens=N * 80, **{**settings, "features": 80, "path": "autograd"}
    )


def live(place: Path, out: Path) -> None:
    """The output of a site while a model generates."""
    prompts = [f"a {word} song" for word in ("sad", "happy", "slow", "fast", "piano")]
    source = PipelineSource(
        tiny_pipeline(), "cross:1", prompts, buffer=200, batch_size=2, num_inference_steps=3,
        audio_end_in_s=1.0,
    )  # fmt: skip
    train(source, out, tokens=N * 40, **SETTINGS)


VARIANTS: dict[str, Callable[[Path, Path], None]] = {
    "store": store,
    "array": array,
    "stream": stream,
    "start": start,
    "live": live,
}


def forked(work: Callable[[], None], delay: float | None) -> int:
    """Run in a fork, killed after a delay (None = never); return its exit code, -9 = killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # it is a zombie where it has ended already
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(variant: str, place: Path, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill a variant so many times, over as many runs as that takes, and compare every run.

    Returns:
        kills; runs; saved: kills after which there was a checkpoint to go on from.

    Raises:
        AssertionError: a run failed, or came out other than the one that was never killed.
    """
    work, whole = VARIANTS[variant], place / "whole"
    begun = time.monotonic()
    assert forked(partial(work, place, whole), None) == 0
    length = time.monotonic() - begun
    killed = runs = saved = 0
    while killed < kills:
        out = place / f"run-{runs:03d}"
        while True:
            delay = length * chance.uniform(0.01, 0.35) if killed < kills else None
            code = forked(partial(work, place, out), delay)
            assert code in (0, -signal.SIGKILL), f"{variant}: exit {code} after {killed} kills"
            if code == 0:
                break
            killed += 1
            saved += any((out / "checkpoints").glob("step-*"))
        same(whole, out)
        runs += 1
    return {"kills": killed, "runs": runs, "saved": saved}


def same(whole: Path, out: Path) -> None:
    """Compare the weights bit for bit, the metrics, and that nothing else is left."""
    ours, theirs = (Sae.load(p / "sae.safetensors").state_dict() for p in (out, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{out.name}: other {name}"
    assert metrics(out) == metrics(whole), f"{out.name}: other metrics"
    steps = [row["step"] for row in metrics(out)]
    assert steps == sorted(set(steps)) and all(step % EVERY == 0 for step in steps)
    assert not list(out.rglob("*.part")), f"{out.name}: unfinished files are left"


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=(*VARIANTS, "all"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of the threads of OpenMP
    for variant in VARIANTS if given.variant == "all" else (given.variant,):
        with tempfile.TemporaryDirectory() as place:
            VARIANTS[variant](Path(place), Path(place) / "warm")  # imports are no moments to die
            found = check(variant, Path(place), given.kills, random.Random(given.seed))
        print(json.dumps({"variant": variant, **found}), flush=True)


if __name__ == "__main__":
    main()
