# SPDX-License-Identifier: Apache-2.0
"""A whole patching sweep and a whole strength sweep: one shared batch against one run each.

Baselines use plain PyTorch hooks on the same pipeline, written as well as they can be:
- `hooks`: one generation a preset (or strength), the clean context known beforehand;
- `hooks, published protocol`: as the public code of arXiv 2602.11910 does it, a clean generation
  for every preset to record what its sites see, then the patched one.
End to end: text encoding, generation, reading by both judges. Results must agree first.

    python bench/bench_sharing.py [--rounds 3] [--steps 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from sidechain import sites
from sidechain._memory import keep_freed_memory
from sidechain.data.concepts import concept
from sidechain.studies import common
from sidechain.studies import localization as loc
from sidechain.studies.localization.presets import single_presets
from sidechain.studies.localization.run import _generate as patched
from sidechain.studies.localization.run import pairs_of
from sidechain.studies.steering import SteeringConfig
from sidechain.studies.steering.run import Row, generate_rows, test_prompts
from sidechain.studies.vectors import VectorConfig, build
from sidechain.taps import contexts

STRENGTHS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@contextlib.contextmanager
def context_hooks(modules, clean):
    """Swap the conditional row's context at some modules: a plain forward pre-hook on each."""

    def swap(module, args, kwargs):
        context = kwargs["encoder_hidden_states"].clone()
        context[1:] = clean
        return args, {**kwargs, "encoder_hidden_states": context}

    handles = [m.register_forward_pre_hook(swap, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def recording_hooks(modules, store):
    """Record what each module sees, at every step, as a clean run for patching does."""

    def record(module, args, kwargs):
        store.setdefault(module, []).append(kwargs["encoder_hidden_states"].detach().clone())

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def steering_hooks(modules, vector, strength):
    """Add strength x vector of the step to the conditional row: a plain forward hook on each."""
    calls = dict.fromkeys(modules, 0)

    def add(module, args, output):
        step = calls[module]
        calls[module] += 1
        output[1:] += strength * vector[module][step]
        return output

    handles = [m.register_forward_hook(add) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Localize:
    """All sites one by one, none and all, for one prompt pair."""

    def __init__(self, pipe, judges, steps):
        self.pipe, self.judges, self.steps = pipe, judges, steps
        self.config = loc.LocalizationConfig(out=Path("unused"), pairs=1, steps=steps)
        self.pair = pairs_of(self.config, "drums")[0]
        self.modules = {site.alias: site.module for site in sites(pipe, "cross:*")}
        self.presets = single_presets(list(self.modules))

    def _generate(self, prompt):
        latents = common.generate(
            self.pipe, self.pipe.encode_prompt([prompt]), [common.noise_seed(0, 0)],
            steps=self.steps, guidance=3.0,
        )  # fmt: skip
        return latents

    def shared(self):
        count = len(self.presets)
        clean = contexts(self.pipe, [self.pair.clean]).expand(count, -1, -1)
        corrupted = self.pipe.encode_prompt([self.pair.corrupted]).expand(count, -1, -1)
        jobs = [(self.pair, preset) for preset in self.presets]
        latents = patched(self.config, self.pipe, jobs, clean, corrupted, 0)
        common.readings(self.judges, latents)
        return latents

    def hooks(self):
        clean = contexts(self.pipe, [self.pair.clean])
        rows = []
        for preset in self.presets:
            with context_hooks([self.modules[name] for name in preset.sites], clean):
                rows.append(self._generate(self.pair.corrupted))
            common.readings(self.judges, rows[-1])
        return torch.cat(rows)

    def protocol(self):
        rows = []
        for preset in self.presets:
            chosen = [self.modules[name] for name in preset.sites]
            store = {}
            with recording_hooks(chosen, store):
                self._generate(self.pair.clean)
            clean = store[chosen[0]][0][1:] if chosen else None
            with context_hooks(chosen, clean):
                rows.append(self._generate(self.pair.corrupted))
            common.readings(self.judges, rows[-1])
        return torch.cat(rows)


class Sweep:
    """Ten strengths of one vector at two sites, for one prompt."""

    def __init__(self, pipe, judges, steps):
        self.pipe, self.judges = pipe, judges
        self.config = SteeringConfig(out=Path("unused"), concept="drums", steps=steps)
        setup = VectorConfig(concept="drums", pairs=2, steps=steps)
        self.vector = build(pipe, setup, progress=False)
        self.chosen = ["cross:2", "cross:3"]
        self.prompts = test_prompts(self.config, concept("drums"))[:1]
        found = {site.alias: site for site in sites(pipe, self.chosen)}
        self.modules = {site.module: self.vector[site.name, "cond"] for site in found.values()}

    def shared(self):
        rows = [Row(0, "localized", strength) for strength in STRENGTHS]
        latents = generate_rows(
            self.config, self.pipe, self.vector, self.chosen, self.prompts, rows
        )
        common.readings(self.judges, latents)
        return latents

    def hooks(self):
        rows = []
        for strength in STRENGTHS:
            encoded = self.pipe.encode_prompt(self.prompts)
            with steering_hooks(list(self.modules), self.modules, strength):
                latents = common.generate(
                    self.pipe, encoded, [common.noise_seed(0, 0)],
                    steps=self.config.steps, guidance=3.0,
                )  # fmt: skip
            common.readings(self.judges, latents)
            rows.append(latents)
        return torch.cat(rows)


def measure(ways, rounds):
    """Median seconds of each way, interleaved, after one run each whose results must agree."""
    results = {name: way() for name, way in ways.items()}
    reference = results["shared"]
    for name, found in results.items():
        error = float((found - reference).abs().max() / reference.abs().max())
        if error > 1e-3:
            raise SystemExit(f"{name}: results differ from the shared batch by {error:.1e}")
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_freed_memory()  # as the command line does; the baselines profit too
    pipe, judges = common.load("zoo:music")
    localize, sweep = Localize(pipe, judges, chosen.steps), Sweep(pipe, judges, chosen.steps)
    tables = {
        "localization, 10 presets": {
            "shared": localize.shared,
            "hooks": localize.hooks,
            "hooks, published protocol": localize.protocol,
        },
        "strength sweep, 10 strengths": {"shared": sweep.shared, "hooks": sweep.hooks},
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "steps": chosen.steps,
        "rows": [],
    }
    for label, ways in tables.items():
        for name, seconds in measure(ways, chosen.rounds).items():
            record["rows"].append({"case": label, "way": name, "seconds": round(seconds, 3)})
        base = record["rows"][-len(ways)]["seconds"]
        for row in record["rows"][-len(ways) :]:
            row["ratio"] = round(row["seconds"] / base, 2)
            print(f"{label:32s} {row['way']:28s} {row['seconds']:8.2f} s  x{row['ratio']:.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
