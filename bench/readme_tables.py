# SPDX-License-Identifier: Apache-2.0
"""Write the measured tables of README.md from the files in bench/results.

    python bench/readme_tables.py [--check]

Everything between `<!-- results -->` and `<!-- /results -->` is replaced; --check only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from sidechain.metrics import curves

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- results -->", "<!-- /results -->"
AIM = 3.0
BY_FEATURES = "sae-"  # folders of steering runs with `--method sae`
FLOOR = 0.8  # share of clips that must keep what steering should leave alone


def ops_table() -> list[str]:
    """Eager, compiled and native times of the largest case of `tap_`."""
    lines = []
    for run in runs("ops", "tap_", "cpu"):
        rows = pd.DataFrame(run["rows"])
        case = "capture+steer+renorm-R8-T1025-C1536"
        lines += [
            f"`tap_`, capture + steer + renorm at [8, 1025, 1536], {run['isa']}, "
            f"{run['threads']} thread(s), {run['date']}, torch {run['versions']['torch']}, commit "
            f"{run['commit']} (`make bench-ops`):",
            "",
            "| dtype | eager | `torch.compile` | native | against eager | against compiled |",
            "|---|---|---|---|---|---|",
        ]
        for dtype in rows[rows.case == case].dtype.unique():
            part = rows[(rows.case == case) & (rows.dtype == dtype)].set_index("provider")
            times = part.median_us / 1000
            lines.append(
                f"| {dtype} | {times.eager:.1f} ms | {times['compile']:.1f} ms | "
                f"{times.cpu:.1f} ms | {times.eager / times.cpu:.1f}x | "
                f"{times['compile'] / times.cpu:.1f}x |"
            )
        lines.append("")
    return lines


def gpu_table() -> list[str]:
    """The native candidates of every op on every GPU that was measured."""
    lines = []
    found = runs("ops", None, "cuda")
    for name in dict.fromkeys(run["name"] for run in found):
        here = [run for run in found if run["name"] == name]
        first, limits = here[0], here[0]["limits"]
        lines += [
            f"{name}, {first['date']}, torch {first['versions']['torch']}, CUDA "
            f"{first['versions']['cuda']}, commit {first['commit']} (`bench/gpu.sh`); measured "
            f"limits: copy {limits['copy_gbytes_per_s']:g} GB/s, bf16 products "
            f"{limits['bf16_matrix_tflops']:g} TFLOP/s:",
            "",
            "| op, case | dtype | backend | us | of the limit | against plain torch | "
            "against compiled |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in here:
            lines += [_gpu_row(run["op"], row) for row in run["rows"] if row["kind"] == "ours"]
        lines.append("")
    return lines or ["GPU: not measured yet.", ""]


def ratios_table() -> list[str]:
    """Every op's fastest native candidate against plain and compiled torch, on each CPU."""
    lines = []
    for run in runs("ops", None, "cpu"):
        if run["op"] == "tap_":
            continue  # it has a table of its own
        lines += [
            f"`{run['op']}`, {run['isa']}, {run['threads']} thread(s), {run['date']}, commit "
            f"{run['commit']} (`make bench-ops`):",
            "",
            "| case | dtype | way | ms | against plain torch | against compiled |",
            "|---|---|---|---|---|---|",
            *(
                f"| {row['case']} | {row['dtype']} | {row['provider']} | "
                f"{row['median_us'] / 1000:.2f} | {_times(row['times_plain'])} | "
                f"{_times(row['times_compiled'])} |"
                for row in run["rows"]
                if row["kind"] == "ours" and row["provider"] != "reference"
            ),
            "",
        ]
    return lines


def sae_table() -> list[str]:
    """Training steps of dictionaries, their encoders, and the memory of a step."""
    parts = {
        "steps": ("Training steps of sparse autoencoders", _steps_of),
        "encode": ("Encoders of sparse autoencoders", _encoders_of),
        "memory": ("Memory of a training step", _memory_of),
    }
    lines = []
    for part, (title, written) in parts.items():
        found = runs("sae", part, "cpu") + runs("sae", part, "cuda")
        for run in found:
            lines += [*written(run), ""]
        if not found:
            lines += [f"{title}: not measured yet (`make bench-sae`).", ""]
    return lines


def _stamp(run: dict) -> str:
    """Where and when: what every table of the section carries."""
    threads = f", {run['threads']} thread(s)" if run["threads"] else ""
    status = "" if run.get("status", "passed") == "passed" else f", {run['status']}"
    return (
        f"{run['name']} {run['isa'] or ''}{threads}, {run['date']}, torch "
        f"{run['versions']['torch']}, commit {run['commit']}{status} (`make bench-sae`)"
    )


def _steps_of(run: dict) -> list[str]:
    return [
        f"Training steps of a TopK dictionary, {_stamp(run)}. Every trainer starts from the same "
        "weights and takes the same batches with fused Adam; each of its steps is timed next to "
        "one of ours, and all ratios are of these pairs. Who has explained less of the variance "
        "than dense float32 torch after the same tokens, by more than a tenth of the way, does not "
        "count; `~`: extrapolated from a few tokens, since bfloat16 is emulated there:",
        "",
        "| N, d, F, k | trainer | ms | FVU | counts | times ours | against best package | against "
        "dense bf16 |",
        "|---|---|---|---|---|---|---|---|",
        *(_step_row(row) for row in run["rows"]),
    ]


def _step_row(row: dict) -> str:
    facts = row["facts"]
    name = " ".join(filter(None, (row["provider"], facts.get("version"))))
    if row["failed"]:
        return f"| {row['case']} | {name} | not run: {row['failed']} | | | | | |"
    loss = f"{facts['fvu']:.4f}" if "fvu" in facts else ""
    about = "~" if row["method"].startswith("extrapolated") else ""
    return (
        f"| {row['case']} | {name} | {about}{row['median_us'] / 1000:.1f} | {loss} | "
        f"{facts['counts']} | {about}{_times(facts['x ours'])} | {_times(facts.get('x peer'))} | "
        f"{_times(facts.get('x dense bf16'))} |"
    )


def _encoders_of(run: dict) -> list[str]:
    return [
        f"`topk_encode` against a linear layer and `topk` in float32, {_stamp(run)}. Recall and "
        "equal sets (share of the rows) are of the exact sets in float64:",
        "",
        "| N, d, F, k | way | ms | recall | equal sets | against plain torch |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['provider']} | {row['median_us'] / 1000:.1f} | "
            f"{row['facts']['recall']:.5f} | {row['facts']['equal sets']:.4f} | "
            f"{_times(row['times_plain'])} |"
            for row in run["rows"]
            if row["provider"] != "reference fp32"
        ),
    ]


def _memory_of(run: dict) -> list[str]:
    return [
        "Memory at the peak of a step, beyond what is held between steps (weights and moments), "
        f"{_stamp(run)}:",
        "",
        "| N, d, F, k | trainer | MiB | share of dense torch | measured as |",
        "|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['provider']} | not run: {row['failed']} | | |"
            if row["failed"]
            else f"| {row['case']} | {row['provider']} | {row['facts']['extra_mib']:g} | "
            f"{row['facts'].get('of dense', float('nan')):.1%} | {row['method']} |"
            for row in run["rows"]
        ),
    ]


def store_table() -> list[str]:
    """Reading and writing activations."""
    lines = []
    for run in runs("store", "read", "cpu"):
        lines += [
            f"Reading batches of a store from the page cache in random order, {_stamp(run)}. "
            "`memcpy` copies neighbouring rows; aimed at 80 % of its speed:",
            "",
            "| site | bytes a row | way | GB/s | of memcpy |",
            "|---|---|---|---|---|",
            *(
                f"| {row['case']} | {2 * int(row['case'].rsplit('-C', 1)[1])} | {row['provider']} "
                f"| {row['gbytes_per_s']:.2f} | {row['facts']['of memcpy']:.0%} |"
                for row in run["rows"]
            ),
            "",
        ]
    for run in runs("store", "write", "cpu"):
        lines += [
            f"Writing the output of a site, one write or one file a sample, {_stamp(run)}; aimed "
            "at 10 times the speed of files:",
            "",
            "| site | way | MB/s | the store is faster by |",
            "|---|---|---|---|",
            *(
                f"| {row['case']} | {row['provider']} | {1000 * row['gbytes_per_s']:.0f} | "
                f"{_times(row['facts']['x ours'])} |"
                for row in run["rows"]
            ),
            "",
        ]
    return lines or ["Reading and writing a store: not measured yet (`make bench-sae`).", ""]


def hooks_table() -> list[str]:
    """What hooks and taps add to a call."""
    lines = []
    for run in runs("hooks", None, "cpu"):
        rows = pd.DataFrame(run["rows"])
        rows["added"] = [facts["added_us"] for facts in rows.facts]
        wide = rows[rows.kind != "bare"].pivot(index="provider", columns="case", values="added")
        order = [p for p in rows.provider.unique() if p in wide.index]
        names = list(dict.fromkeys(rows.case))
        lines += [
            f"Microseconds that hooks and taps add to one call of a site, {run['threads']} "
            f"thread(s), {run['date']}, commit {run['commit']} (`make bench-hooks`):",
            "",
            f"| | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
            *(f"| {p} | {' | '.join(f'{wide.loc[p, n]:.0f}' for n in names)} |" for p in order),
            "",
        ]
    return lines


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _gpu_row(op: str, row: dict) -> str:
    """One line of the GPU table; what could not be compared stays blank."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        f"| `{op}` {row['case']} | {row['dtype']} | {row['provider']} | "
        f"{figure(row['median_us'], '.1f')} | {figure(row['share'], '.0%')} | "
        f"{_times(row['times_plain'])} | {_times(row['times_compiled'])} |"
    )


def runs(section: str, op: str | None, device: str) -> list[dict]:
    """Stored runs of a section; None as op stands for all. Of several CPUs the newest run."""
    found = stored(section, op, device)
    if device != "cpu":
        return found
    newest: dict = {}
    for run in found:
        before = newest.get(run["op"])
        if before is None or run["date"] >= before["date"]:
            newest[run["op"]] = run
    return list(newest.values())


def stored(section: str, op: str | None, device: str) -> list[dict]:
    """The runs of all result files, each with the `file` it is in."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        found += [
            {**run, "file": path.name}
            for run in record.get("runs", [])
            if run["section"] == section and op in (None, run["op"]) and run["device"] == device
        ]
    return found


def elsewhere() -> list[str]:
    """Training steps on CPUs that are not in the tables: ours against the best package."""
    shown = {run["file"] for run in runs("sae", "steps", "cpu")}
    lines = []
    for run in stored("sae", "steps", "cpu"):
        if run["file"] in shown:
            continue
        best = {
            row["provider"]: []
            for row in run["rows"]
            if row["provider"] in ("ours fp32", "ours int8")
        }
        for row in run["rows"]:
            if row["provider"] in best:
                best[row["provider"]].append(_times(row["facts"].get("x peer")))
        told = "; ".join(f"{name} {', '.join(times)}" for name, times in best.items())
        lines += [
            f"Training steps on {run['name']} {run['isa']} ({run['date']}, commit "
            f"{run['commit']}), shape by shape against the best package: {told}. All of that "
            f"machine is in `bench/results/{run['file']}`.",
            "",
        ]
    return lines


def sharing_table() -> list[str]:
    """One shared batch against one run each, on every machine."""
    lines = []
    for run in runs("sharing", None, "cpu") + runs("sharing", None, "cuda"):
        threads = f", {run['threads']} thread(s)" if run["threads"] else ""
        lines += [
            "One batch for a whole sweep against one generation each with plain hooks, equal "
            f"results, end to end, {run['name']} {run.get('isa') or ''}{threads}, {run['date']}, "
            f"commit {run['commit']} (`make bench-sharing`):",
            "",
            "| sweep | way | seconds | against shared |",
            "|---|---|---|---|",
            *(
                f"| {row['case']} | {row['provider']} | {row['median_us'] / 1e6:.2f} | "
                f"{row['facts']['x shared']:.2f}x |"
                for row in run["rows"]
            ),
            "",
            _shortfall(run),
            "",
        ]
    return lines


def _shortfall(run: dict) -> str:
    """Name the sweeps that miss the 3x aimed at, against plain hooks."""
    missed = [
        row["case"]
        for row in run["rows"]
        if row["provider"] == "hooks" and row["facts"]["x shared"] < AIM
    ]
    if not missed:
        return ""
    return (
        f"Aimed at {AIM:g}x against plain hooks; missed by: {'; '.join(missed)}. On a CPU the "
        "shared run spends its time in matrix products near the machine's rate, and rows of a "
        "sweep differ from their first step on, so little is left to share."
    )


def _probability_reading(scores: pd.DataFrame, sites: list[str], tau: float) -> str:
    """The same localization read in plain probabilities."""
    table = scores.pivot_table(
        index="concept", columns="preset", values="probability", aggfunc="mean"
    )
    full = table["all"] - table["none"]
    means = table[sites].sub(table["none"], axis=0).div(full, axis=0).clip(lower=0).mean()
    listed = ", ".join(f"{site} {value:.2f}" for site, value in means.items())
    passing = ", ".join(means.index[means >= tau]) or "none"
    return (
        "The score was changed from probability to log-odds after a first look (half-trained "
        "model, 3 concepts, 2 pairs) in which no single site reached the threshold. In "
        f"probabilities this run has mean impacts {listed}; at or above {tau:.2f}: {passing}."
    )


def localization_table() -> list[str]:
    """Where each concept enters."""
    folder = RESULTS / "music" / "localization"
    summary = json.loads((folder / "summary.json").read_text())
    stability = summary["stability"]
    lines = [
        "Localization of the shipped model (4 prompt pairs, 3 seeds, 12 steps, impact in log-odds, "
        f"mean of both judges). Ranks agree between seeds: rho {stability['mean_rho']:.2f} "
        f"[{stability['low']:.2f}, {stability['high']:.2f}]. Sites at or above the mean-impact "
        f"threshold of {summary['tau']:.2f}: {', '.join(summary['functional'])}. Share of the full "
        "effect with the best k sites of a concept patched:",
        "",
        "| concept | best sites, in order | k=1 | k=2 | k=3 | k=4 | 90 % at k |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, curve in summary["cumulative_by_concept"].items():
        shares = " | ".join(f"{value:.2f}" for value in curve["effect"][1:5])
        order = ", ".join(site.removeprefix("cross:") for site in curve["order"][:4])
        lines.append(f"| {name} | {order} | {shares} | {curve['needed']} |")
    scores = pd.read_csv(folder / "scores.csv")
    reading = _probability_reading(scores, summary["sites"], summary["tau"])
    return [*lines, "", reading, ""]


def steering_table() -> list[str]:
    """The best strength of the localized arm that keeps enough, beside all sites and random."""
    lines = [
        "Steering by CAA vectors (50 pairs), best strength at which both judges see the instrument "
        "(for instruments: drums) kept in at least 80 % of the clips; values: latent judge / mel "
        "judge. The strength is picked on the same prompts that are reported, so these are best "
        "cases; `fine-` rows are finer grids (and for drums another set of sites) tried after the "
        "first sweep, with partly the same prompts:",
        "",
        "| concept | n | sites | arm | strength | P before | P after | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for folder in sorted((RESULTS / "music" / "steering").iterdir()):
        if folder.name.startswith(BY_FEATURES):
            continue
        table = pd.read_csv(folder / "curves.csv")
        summary = json.loads((folder / "summary.json").read_text())
        sites = ", ".join(site.removeprefix("cross:") for site in summary["localized"])
        count = summary["prompts"]
        for arm in ("localized", "all", "ablated", "random"):
            part = table[table.arm == arm]
            if part.empty:
                continue
            wide = part.pivot(index="strength", columns="judge")
            allowed = wide[(wide.kept.min(axis=1) >= FLOOR) & (wide.index != 0)]
            if allowed.empty:
                lines.append(
                    f"| {folder.name} | {count} | {sites} | {arm} | none keeps enough | | | |"
                )
                continue
            best = allowed.score.mean(axis=1).idxmax()

            def pair(column: str, strength: float, wide: pd.DataFrame = wide) -> str:
                row = wide.loc[strength, column]
                return f"{row['latent']:.2f} / {row['mel']:.2f}"

            lines.append(
                f"| {folder.name} | {count} | {sites} | {arm} | {best:g} | {pair('score', 0.0)} | "
                f"{pair('score', best)} | {pair('kept', best)} |"
            )
    return [*lines, ""]


def methods_table() -> list[str]:
    """Mean differences beside dictionary features, at the same sites, prompts and noise."""
    lines = []
    for folder in sorted((RESULTS / "music" / "steering").glob(f"{BY_FEATURES}*")):
        concept = folder.name.removeprefix(BY_FEATURES)
        tables = {
            "CAA": pd.read_csv(folder.parent / concept / "curves.csv"),
            "features": pd.read_csv(folder / "curves.csv"),
        }
        wide = {
            name: table[table.arm == "localized"].pivot(index="strength", columns="judge")
            for name, table in tables.items()
        }
        summary = json.loads((folder / "summary.json").read_text())
        sites = ", ".join(site.removeprefix("cross:") for site in summary["localized"])
        for name, part in wide.items():
            areas = {judge: _common_area(wide, name, judge) for judge in ("latent", "mel")}
            allowed = part[(part.kept.min(axis=1) >= FLOOR) & (part.index != 0)]
            best = allowed.score.mean(axis=1).idxmax() if len(allowed) else None

            def pair(column: str, part: pd.DataFrame = part, best: float | None = best) -> str:
                if best is None:
                    return "none keeps enough"
                return " / ".join(f"{part.loc[best, (column, j)]:.2f}" for j in ("latent", "mel"))

            lines.append(
                f"| {concept} | {sites} | {name} | {'' if best is None else f'{best:g}'} | "
                f"{pair('score')} | {pair('kept')} | {areas['latent']:.2f} / {areas['mel']:.2f} |"
            )
    if not lines:
        return []
    return [
        "Steering by dictionary features (`--method sae`: the 20 best of a step by TADA's score, "
        "weighted by their natural difference) beside CAA, 10 prompts, 50 pairs, the same sites "
        "and noise. Best strength at which both judges see enough kept, P there, and the area "
        "under P over distance up to the smaller of both methods' largest distances; latent judge "
        "/ mel judge. The strength is picked on the prompts reported:",
        "",
        "| concept | sites | method | strength | P | kept | AUC |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def _common_area(wide: dict[str, pd.DataFrame], name: str, judge: str) -> float:
    sweeps = {n: (p.distance[judge].to_numpy(), p.index.to_numpy()) for n, p in wide.items()}
    limit = curves.cutoff(sweeps.values(), 1)
    distance, strength = sweeps[name]
    return curves.score(distance, wide[name].score[judge].to_numpy(), strength, {1: limit}).auc


def main() -> int:
    """Rewrite or compare; returns 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    body = [
        START,
        "## Measured",
        *ops_table(),
        *ratios_table(),
        *gpu_table(),
        *hooks_table(),
        *sae_table(),
        *elsewhere(),
        *store_table(),
        *sharing_table(),
        *localization_table(),
        *steering_table(),
        *methods_table(),
        END,
    ]
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    wanted = before + "\n".join(body) + after
    if check:
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
