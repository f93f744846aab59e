# SPDX-License-Identifier: Apache-2.0
"""The command `sidechain`: options are checked here, the work is done by the studies."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidechain import _options as options
from sidechain._memory import keep_freed_memory
from sidechain._parser import ARMS, BAD_INPUT, Command, build_parser

INTERRUPTED = 130
# "--strengths -4,0,4" would read as an unknown option to argparse
NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0; 2 after bad input (one line on stderr); 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(COMMANDS)
    try:
        parsed = parser.parse_args(_join_negatives(arguments))
    except SystemExit as error:  # --help, --version, or an error already reported
        return int(error.code or 0)
    command: Command | None = getattr(parsed, "command", None)
    if command is None:
        parser.print_help()
        return 0
    keep_freed_memory()
    try:
        status = command(parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("sidechain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has left (`sidechain curves T.csv | head`); keep the flush at exit quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, NotImplementedError, RuntimeError) as error:
        if parsed.traceback or not _expected(error):
            raise
        print(f"sidechain: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _demo(arguments: argparse.Namespace) -> int:
    out = options.folder(arguments.out)
    seed = options.whole("--seed", arguments.seed, 0)
    demo = _study("demo")
    result = demo.run(out, demo.settings(seed=seed, short=arguments.short))
    print(_report("demo").write(result, out / "report.html"))
    return 0


def _localize(arguments: argparse.Namespace) -> int:
    prompts = options.localization_prompts(arguments.prompts) if arguments.prompts else None
    concepts = options.concepts(arguments.concepts)
    if prompts is not None and arguments.concepts is None:
        concepts = tuple(prompts)
    missing = [name for name in concepts if prompts is not None and name not in prompts]
    if missing:
        raise ValueError(
            f"--prompts: expected pairs for every concept of --concepts, got none for {missing[0]}"
        )
    settings = {
        **_sampling_values(arguments),
        "concepts": concepts,
        "prompts": prompts,
        "sites": arguments.sites,
        "how": arguments.how,
        "windows": options.whole("--windows", arguments.windows, 1),
        "pairs": options.whole("--pairs", arguments.pairs, 1),
        "seeds": options.seeds(arguments.seeds),
        "tau": options.finite("--tau", arguments.tau),
        "out": options.folder(arguments.out),
    }
    study = _study("localization")
    study.run(study.LocalizationConfig(**settings))
    print(settings["out"])
    return 0


def _capture(arguments: argparse.Namespace) -> int:
    settings = {
        **_sampling_values(arguments),
        "prompts": options.test_prompts(arguments.prompts),
        "sites": arguments.sites,
        "passes": arguments.passes,
        "window": options.window("--window", arguments.window),
        "every": options.whole("--every", arguments.every, 1),
        "tokens": options.span("--tokens", arguments.tokens),
        "dtype": arguments.dtype,
        "policy": arguments.policy,
        "queue_bytes": options.whole("--queue-mb", arguments.queue_mb, 1) << 20,
        "shard_bytes": options.whole("--shard-mb", arguments.shard_mb, 1) << 20,
        "seed": options.whole("--seed", arguments.seed, 0),
        "out": options.folder(arguments.out),
    }
    study = _study("capture")
    for site, found in study.run(study.CaptureConfig(**settings)).items():
        lost = f", {found.dropped} dropped" if found.dropped else ""
        print(f"{settings['out']} {site}: {len(found)} rows of {found.width}{lost}")
    return 0


def _vector(arguments: argparse.Namespace) -> int:
    if arguments.concept is None and arguments.prompts is None:
        raise ValueError("vector: expected --concept NAME or --prompts FILE.csv, got neither")
    concept = arguments.concept
    if concept is not None and arguments.prompts is None:
        concept = options.concept(concept)
    name = concept or Path(arguments.prompts).stem
    out = arguments.out or f"runs/vectors/{name}.safetensors"
    settings = {
        **_sampling_values(arguments),
        "concept": name,
        "prompts": options.contrast_prompts(arguments.prompts) if arguments.prompts else None,
        "pairs": options.whole("--pairs", arguments.pairs, 1),
        "sites": arguments.sites,
        "seed": options.whole("--seed", arguments.seed, 0),
        "normalise": arguments.unit,
        **_method_values(arguments),
        "out": options.target(out, ".safetensors"),
    }
    study = _study("vectors")
    study.run(study.VectorConfig(**settings))
    print(settings["out"])
    return 0


def _steer(arguments: argparse.Namespace) -> int:
    concept = arguments.concept
    if concept is not None:
        concept = options.concept(concept)
    if arguments.vector and arguments.method != "caa":
        raise ValueError(
            f"--method: expected no --vector [it says how it was made], got {arguments.method} "
            f"and {arguments.vector}"
        )
    settings = {
        **_sampling_values(arguments),
        "vector": options.readable("--vector", arguments.vector) if arguments.vector else None,
        "concept": concept,
        "strengths": options.strengths(arguments.strengths),
        "sites": arguments.sites,
        "prompts": options.test_prompts(arguments.prompts),
        "arms": options.chosen("--arms", arguments.arms, ARMS),
        "passes": arguments.passes,
        "renorm": arguments.renorm,
        "seed": options.whole("--seed", arguments.seed, 0),
        "audio": arguments.audio,
        **_method_values(arguments),
        "out": options.folder(arguments.out),
    }
    study = _study("steering")
    study.run(study.SteeringConfig(**settings))
    print(settings["out"])
    return 0


def _sae_train(arguments: argparse.Namespace) -> int:
    from sidechain import sae
    from sidechain.sae import command

    settings = {
        **command.settings(arguments.set),
        "tokens": options.whole("--tokens", arguments.tokens, 1),
        "batch": options.whole("--batch", arguments.batch, 1),
        "sparsity": options.finite("--sparsity", arguments.sparsity, least=0.0),
        "seed": options.whole("--seed", arguments.seed, 0),
    }
    if arguments.lr is not None:
        settings["lr"] = options.finite("--lr", arguments.lr)
    source = command.source(
        arguments.data,
        site=arguments.site,
        target=arguments.target,
        seed=settings["seed"],
        live=lambda: _live_source(arguments, settings["seed"]),
    )
    k = None if arguments.k is None else options.whole("--k", arguments.k, 1)
    trainer = sae.Trainer(
        command.config(
            source, architecture=arguments.architecture, features=arguments.features, k=k
        ),
        sae.TrainConfig(**settings),
        source,
        options.folder(
            arguments.out or f"runs/sae/{command.slug(source)}-{arguments.architecture}"
        ),
        mesh=sae.from_environment(options.whole("--feature-slices", arguments.feature_slices, 1)),
        loggers=options.chosen("--log", arguments.log, sae.LOGGERS) if arguments.log else (),
    )
    trainer.run()
    if trainer.mesh.first:
        print(trainer.result)
    return 0


def _live_source(arguments: argparse.Namespace, seed: int) -> Any:
    if arguments.prompts is None:
        raise ValueError(
            f"sae train: expected the folder of a store, or --prompts FILE beside a site, got "
            f"{arguments.data!r} alone"
        )
    prompts = options.lines("--prompts", arguments.prompts)
    settings = {
        "target": arguments.target,
        "every": options.whole("--every", arguments.every, 1),
        "buffer": options.whole("--buffer", arguments.buffer, 1),
        "num_inference_steps": options.whole("--steps", arguments.steps, 1),
        "guidance_scale": options.finite("--guidance", arguments.guidance, least=0.0),
    }
    model = options.model(arguments.model)

    from sidechain import sae, zoo

    pipe = zoo.music() if model == "zoo:music" else zoo.music(folder=model)
    return sae.PipelineSource(pipe, arguments.data, prompts, seed=seed, **settings)


def _sae_score(arguments: argparse.Namespace) -> int:
    folder = arguments.dictionaries
    settings = {
        **_sampling_values(arguments),
        "dictionaries": None if folder is None else options.existing("--dictionaries", folder),
        "sites": arguments.sites,
        "concepts": options.concepts(arguments.concepts),
        "score": arguments.score,
        "activations": arguments.activations,
        "features": options.whole("--features", arguments.features, 1),
        "moments": options.whole("--moments", arguments.moments, 1),
        "pairs": options.whole("--pairs", arguments.pairs, 1),
        "prompts": options.whole("--prompts", arguments.prompts, 1),
        "seed": options.whole("--seed", arguments.seed, 0),
        "out": options.folder(arguments.out),
    }
    study = _study("dictionaries")
    found = study.run(study.DictionaryConfig(**settings))
    print(_report("dictionary").write(found, settings["out"] / "report.html"))
    return 0


def _curves(arguments: argparse.Namespace) -> int:
    from sidechain.metrics import curve_table
    from sidechain.metrics.tables import write_table

    rows = curve_table.read_sweeps(arguments.table)
    cutoff = [method.strip() for method in arguments.cutoff.split(",") if method.strip()]
    scored = curve_table.score_sweeps(
        rows, cutoff=cutoff, directions=arguments.direction, mean=arguments.mean
    )
    for note in curve_table.undefined_directions(rows, cutoff, arguments.direction):
        print(f"sidechain: note: {note}; scores left blank (see --direction)", file=sys.stderr)
    write_table(sys.stdout, curve_table.COLUMNS, scored)
    return 0


def _impact(arguments: argparse.Namespace) -> int:
    from sidechain.metrics import impact_table
    from sidechain.metrics.tables import write_table

    tau = options.finite("--tau", arguments.tau)
    rows = impact_table.read_impacts(arguments.table)
    ranked = impact_table.mean_impacts(rows, tau=tau, metric=arguments.metric)
    for note in impact_table.incomplete_sites(rows, arguments.metric):
        print(f"sidechain: note: {note}; mean over the others", file=sys.stderr)
    write_table(sys.stdout, impact_table.COLUMNS, ranked)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from sidechain.bench import command

    threads, seconds = arguments.threads, arguments.seconds
    runs = command.run(
        arguments.section,
        device=arguments.device,
        threads=None if threads is None else options.whole("--threads", threads, 1),
        only=arguments.only,
        seconds=None if seconds is None else options.finite("--seconds", seconds, least=0.0),
        fresh=arguments.fresh,
        quick=arguments.quick,
        keep_failed=arguments.keep_failed,
        json=Path(arguments.json) if arguments.json else None,
        compare=options.readable("--compare", arguments.compare) if arguments.compare else None,
    )
    return command.exit_code(runs)


def _doctor(arguments: argparse.Namespace) -> int:
    from sidechain.doctor import doctor_report, format_doctor

    report = doctor_report()
    print(json.dumps(report, indent=2, default=str) if arguments.json else format_doctor(report))
    return 0


COMMANDS: dict[str, Command] = {
    "demo": _demo,
    "localize": _localize,
    "capture": _capture,
    "vector": _vector,
    "steer": _steer,
    "sae train": _sae_train,
    "sae score": _sae_score,
    "curves": _curves,
    "impact": _impact,
    "bench": _bench,
    "doctor": _doctor,
}


def _sampling_values(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model(arguments.model),
        "steps": options.whole("--steps", arguments.steps, 1),
        "guidance": options.finite("--guidance", arguments.guidance, least=0.0),
        "batch_rows": options.whole("--batch-rows", arguments.batch_rows, 1),
    }


def _method_values(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.dictionaries
    return {
        "method": arguments.method,
        "dictionaries": None if folder is None else options.existing("--dictionaries", folder),
        "features": options.whole("--features", arguments.features, 1),
        "score": arguments.score,
        "weighting": arguments.weighting,
    }


def _study(name: str) -> Any:
    return importlib.import_module(f"sidechain.studies.{name}")


def _report(name: str) -> Any:
    return importlib.import_module(f"sidechain.report.{name}")


def _join_negatives(arguments: list[str]) -> list[str]:
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--strengths" and NEGATIVE.match(argument):
            joined[-1] = f"--strengths={argument}"
        else:
            joined.append(argument)
    return joined


def _expected(error: BaseException) -> bool:
    """Whether an error is an answer to bad input; RuntimeError only if this package raised it."""
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(__file__).parent in Path(frames[-1].filename).parents


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
