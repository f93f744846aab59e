# SPDX-License-Identifier: Apache-2.0
"""The options of every command, with their help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sidechain._version import __version__

Command = Callable[[argparse.Namespace], int]

BAD_INPUT = 2
BENCHES = ("ops", "hooks", "sae", "store", "sharing", "generation")
ARMS = ("localized", "all", "ablated", "random")
ACTIVATIONS = ("open", "kept")
SCORES = ("tada", "diff", "ratio", "mean_pos", "cohens_d", "logistic")
WEIGHTINGS = ("natural", "none", "raw", "softmax", "sqrt", "log")
PASSES = (
    "cond_only",
    "uncond_only",
    "both_cond",
    "both_uncond",
    "separate",
    "uncond_for_cond",
)


def build_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Build the parser of all commands.

    Args:
        run: the function behind each command; parsing sets it as `command`.
    """
    parser = _Parser(
        prog="sidechain",
        description="Localize, steer and score concepts in the attention of diffusion models.",
        epilog="Start with `sidechain demo`; `sidechain COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"sidechain {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from, for bug reports"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands, run["demo"])
    _add_localize(commands, run["localize"])
    _add_capture(commands, run["capture"])
    _add_vector(commands, run["vector"])
    _add_steer(commands, run["steer"])
    _add_sae(commands, run)
    _add_curves(commands, run["curves"])
    _add_impact(commands, run["impact"])
    _add_bench(commands, run["bench"])
    _add_doctor(commands, run["doctor"])
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report bad usage like any bad input: one line, exit code 2."""
        print(f"sidechain: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def _new(commands: Any, name: str, summary: str, command: Command, **extra: Any) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=extra.pop("long", summary), **extra
    )
    parser.set_defaults(command=command)
    return parser


def _add_demo(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "demo",
        "localize, steer and hear it: one HTML report",
        run,
        long="Localize concepts in the small music model that ships with the package, steer three "
        "of them over a range of strengths and write one self-contained HTML report with "
        "playable audio. The path of the report is printed last.",
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="default %(default)s")
    parser.add_argument("--seed", default="0", metavar="N", help="default %(default)s")
    parser.add_argument("--short", action="store_true", help="fewer prompts and strengths")


def _add_localize(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "localize",
        "measure through which sites a concept enters",
        run,
        long="Give one attention site at a time the prompt with the concept, all others the prompt "
        "without it, and measure what share of the full effect comes through (impact). Writes "
        "tables with bootstrap intervals and a heat map.",
    )
    _model(parser)
    parser.add_argument(
        "--concepts", metavar="A,B,...", help="comma list, or all (default: twelve of them)"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE.csv",
        help="own prompt pairs, columns concept,clean_prompt,corrupted_prompt",
    )
    parser.add_argument(
        "--sites", default="cross:*", metavar="GLOB", help="sites to scan (default %(default)s)"
    )
    parser.add_argument(
        "--how",
        choices=("context", "key", "value"),
        default="context",
        help="what is swapped at a site (default %(default)s: keys and values)",
    )
    parser.add_argument(
        "--windows", default="1", metavar="N", help="also scan runs of N consecutive sites"
    )
    parser.add_argument(
        "--pairs", default="16", metavar="N", help="prompt pairs per concept (default %(default)s)"
    )
    parser.add_argument(
        "--seeds", nargs="+", default=["0"], metavar="N", help="repeat for these seeds (default 0)"
    )
    parser.add_argument(
        "--tau", default="0.10", metavar="X", help="threshold of the mean impact (default 0.10)"
    )
    _sampling(parser, rows=True, seed=False)
    parser.add_argument("--out", default="runs/localize", metavar="DIR", help="default %(default)s")


def _add_capture(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "capture",
        "record activations of sites into a store on disk",
        run,
        long="Generate from prompts and stream every token that the chosen sites put out into "
        "checksummed shards, with step, pass, prompt and token of every row. The same command "
        "continues a run that was cut off, and adds prompts to one that was finished.",
    )
    _model(parser)
    parser.add_argument(
        "--prompts",
        default="100",
        metavar="N|FILE",
        help="number of made-up captions, or a text file with one prompt per line "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--sites", default="cross:*", metavar="GLOB", help="sites to record (default %(default)s)"
    )
    parser.add_argument(
        "--passes",
        choices=("cond", "uncond", "all"),
        default="cond",
        help="guidance passes to record (default %(default)s)",
    )
    parser.add_argument(
        "--window",
        metavar="A:B",
        help="steps A to B - 1, or fractions of the run such as 0.25:0.75 (default: all)",
    )
    parser.add_argument(
        "--every", default="1", metavar="N", help="keep one step in N (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", metavar="A:B[:STEP]", help="a slice of the tokens (default: all)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        default="float16",
        help="of the rows on disk; int8 has a scale for each row (default %(default)s)",
    )
    parser.add_argument(
        "--policy",
        choices=("block", "drop", "spill", "error"),
        default="block",
        help="when the disk is slower than the model: wait, throw rows away and count them, park "
        "them in a temporary file, or stop (default %(default)s)",
    )
    parser.add_argument(
        "--queue-mb", default="256", metavar="N", help="rows waiting in memory (default 256 MiB)"
    )
    parser.add_argument(
        "--shard-mb", default="256", metavar="N", help="size of a shard (default 256 MiB)"
    )
    _sampling(parser, rows=True, seed=True)
    parser.add_argument("--out", default="runs/capture", metavar="DIR", help="default %(default)s")


def _add_vector(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "vector",
        "make a steering vector from prompt pairs",
        run,
        long="Average the attention outputs of prompts with and without a concept, per step, pass "
        "and site, and save their difference as one safetensors file.",
    )
    _model(parser)
    parser.add_argument("--concept", metavar="NAME", help="a concept of the model's data")
    parser.add_argument(
        "--prompts", metavar="FILE.csv", help="own prompts instead, columns positive,negative"
    )
    parser.add_argument(
        "--pairs", default="50", metavar="N", help="prompt pairs (default %(default)s)"
    )
    parser.add_argument(
        "--sites", default="cross:*", metavar="GLOB", help="sites to record (default %(default)s)"
    )
    _method(parser)
    parser.add_argument(
        "--unit",
        action="store_true",
        help="scale every direction to length 1; otherwise strength 1 is one natural difference",
    )
    _sampling(parser, rows=True, seed=True)
    parser.add_argument("--out", metavar="FILE", help="default runs/vectors/CONCEPT.safetensors")


def _add_steer(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "steer",
        "sweep steering strengths and compare arms",
        run,
        long="Generate the same prompts at many strengths of a vector, at the localized sites, at "
        "all sites, at all but the localized ones and along a random direction of equal norm; "
        "score effect, preservation, AUC and smoothness.",
    )
    _model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vector", metavar="FILE", help="a vector of `sidechain vector`")
    source.add_argument("--concept", metavar="NAME", help="make the vector first")
    _method(parser)
    parser.add_argument(
        "--strengths",
        default="0,1,2,4,8",
        metavar="LIST",
        help="a,b,c or lo:hi:n; 0 is always included (default %(default)s)",
    )
    parser.add_argument(
        "--sites",
        metavar="GLOB",
        help="the localized sites (default: the best ones of the shipped localization)",
    )
    parser.add_argument(
        "--prompts",
        default="16",
        metavar="N|FILE",
        help="number of held-out prompts, or a text file with one per line (default %(default)s)",
    )
    parser.add_argument(
        "--arms",
        default=",".join(ARMS),
        metavar="LIST",
        help="of localized,all,ablated,random (default: all four)",
    )
    parser.add_argument(
        "--passes",
        choices=PASSES,
        default="cond_only",
        metavar="MODE",
        help=f"guidance passes to steer: {', '.join(PASSES)} (default %(default)s)",
    )
    parser.add_argument(
        "--renorm", action="store_true", help="keep the length of every steered token"
    )
    parser.add_argument("--audio", action="store_true", help="also write clips to listen to")
    _sampling(parser, rows=True, seed=True)
    parser.add_argument("--out", default="runs/steer", metavar="DIR", help="default %(default)s")


def _add_sae(commands: Any, run: Mapping[str, Command]) -> None:
    parser = commands.add_parser("sae", help="train and score dictionaries of what a site puts out")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_sae_train(actions, run["sae train"])
    _add_sae_score(actions, run["sae score"])


def _add_sae_train(actions: Any, run: Command) -> None:
    parser = _new(
        actions,
        "train",
        "train a dictionary, or go on with a run",
        run,
        long="Train a sparse dictionary on recorded activations, or on what a site puts out while "
        "the model generates. The same command again goes on from the last checkpoint, bit for "
        "bit, also after a crash. Under torchrun the processes share the work.",
    )
    parser.add_argument(
        "data", metavar="STORE|SITE", help="folder of a store, or a site such as cross:3"
    )
    parser.add_argument("--site", metavar="SITE", help="which site of the store")
    parser.add_argument(
        "--target", metavar="SITE", help="reconstruct this site instead: a transcoder"
    )
    parser.add_argument(
        "--architecture",
        choices=("topk", "batch_topk", "matryoshka", "jumprelu", "relu", "gated"),
        default="batch_topk",
        metavar="NAME",
        help="topk, batch_topk, matryoshka, jumprelu, relu or gated (default %(default)s)",
    )
    parser.add_argument(
        "--features", default="8x", metavar="N|Nx", help="or a multiple of the width (default 8x)"
    )
    parser.add_argument(
        "--k", metavar="N", help="features a token (default 32; topk, batch_topk, matryoshka)"
    )
    parser.add_argument(
        "--tokens", default="2000000", metavar="N", help="rows to train on (default %(default)s)"
    )
    parser.add_argument("--batch", default="4096", metavar="N", help="rows a step (default 4096)")
    parser.add_argument("--lr", metavar="X", help="default 2e-4 / sqrt(features / 16384)")
    parser.add_argument(
        "--sparsity", default="5", metavar="X", help="penalty of relu, gated, jumprelu (default 5)"
    )
    parser.add_argument("--seed", default="0", metavar="N", help="default %(default)s")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of sidechain.sae.TrainConfig, such as aux_k=0; may be repeated",
    )
    parser.add_argument(
        "--log",
        default="",
        metavar="LIST",
        help="beside metrics.jsonl: tensorboard,wandb, where installed",
    )
    parser.add_argument(
        "--feature-slices",
        default="1",
        metavar="N",
        help="under torchrun: processes that share one dictionary (default 1)",
    )
    live = parser.add_argument_group("a site of a running model")
    _model(live)
    live.add_argument("--prompts", metavar="FILE", help="text file, one prompt per line")
    live.add_argument("--every", default="1", metavar="N", help="keep every Nth step (default 1)")
    live.add_argument(
        "--buffer", default="262144", metavar="N", help="rows shuffled together (default 262144)"
    )
    _sampling(parser, rows=False, seed=False)
    parser.add_argument("--out", metavar="DIR", help="default runs/sae/SITE-ARCHITECTURE")


def _add_sae_score(actions: Any, run: Command) -> None:
    parser = _new(
        actions,
        "score",
        "measure dictionaries and find the features of concepts",
        run,
        long="Measure dictionaries on captions they were not trained on (unexplained variance, "
        "active and dead features), score their features for concepts from one generation of "
        "prompt pairs, and write tables and one HTML report with the clips in which the best "
        "features are most active. The path of the report is printed last.",
    )
    _model(parser)
    parser.add_argument(
        "--sites", default="cross:*", metavar="GLOB", help="those with a dictionary (default all)"
    )
    parser.add_argument(
        "--dictionaries",
        metavar="DIR",
        help="folder with a dictionary for each site, cross-6.safetensors (default: the zoo)",
    )
    parser.add_argument(
        "--concepts",
        default="drums,vocals,violin",
        metavar="A,B,...",
        help="comma list, or all (default %(default)s)",
    )
    parser.add_argument(
        "--score", choices=SCORES, default="tada", help="what ranks features (default %(default)s)"
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="open",
        help="open: all that are positive, as published; kept: those that the dictionary keeps "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--features", default="3", metavar="N", help="a concept and site (default %(default)s)"
    )
    parser.add_argument(
        "--moments", default="3", metavar="N", help="clips a feature (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", default="16", metavar="N", help="prompt pairs a concept (default %(default)s)"
    )
    parser.add_argument(
        "--prompts", default="32", metavar="N", help="held-out captions (default %(default)s)"
    )
    _sampling(parser, rows=True, seed=True)
    parser.add_argument(
        "--out", default="runs/sae-score", metavar="DIR", help="default %(default)s"
    )


def _add_curves(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "curves",
        "score a table of sweeps: AUC and smoothness",
        run,
        long="Score sweeps by the published definition. TABLE.csv has columns "
        "method,concept,alpha,lpaps,muqt,clap: alignment (muqt, clap; a blank column is allowed) "
        "and distance to the unsteered output (lpaps) per strength (alpha; its sign is the "
        "direction). Prints CSV, blank where a value is undefined. The cut-off of a concept and "
        "direction is the smallest of the largest distances reached by the cut-off methods.",
    )
    parser.add_argument("table", metavar="TABLE.csv", help="the table; - reads standard input")
    parser.add_argument(
        "--cutoff",
        default="pci_all,pci_loc",
        metavar="METHOD[,METHOD]",
        help="methods that set the cut-off; each concept needs rows of each (default %(default)s)",
    )
    parser.add_argument(
        "--direction",
        choices=("both", "positive", "negative"),
        default="both",
        help="sides to score: their mean (default, as published), or one for one-sided sweeps",
    )
    parser.add_argument(
        "--mean", action="store_true", help="append the mean over concepts of each method"
    )


def _add_impact(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "impact",
        "rank sites in a table of impacts",
        run,
        long="Average impact over concepts per block. TABLE.csv has columns "
        "model,metric,concept,block,attn,impact. Prints CSV model,block,attn,mean_impact,"
        "functional; within a model the largest first.",
    )
    parser.add_argument("table", metavar="TABLE.csv", help="the table; - reads standard input")
    parser.add_argument(
        "--tau", default="0.10", metavar="X", help="functional from this mean on (default 0.10)"
    )
    parser.add_argument("--metric", metavar="NAME", help="use the rows of this metric only")


def _add_bench(commands: Any, run: Command) -> None:
    parser = _new(
        commands,
        "bench",
        "time this machine: ops, hooks and training steps against plain torch",
        run,
        long="Measure what this machine can do at best (copy bandwidth, matrix rates), then run "
        "every op (ops), taps at a site (hooks) or SAE training steps (sae) beside what one would "
        "write in plain torch, eager and compiled; or reading and writing activations beside plain "
        "copies and files (store). Prints times, rates, shares of the limit and "
        "ratios; everything is checked for equal results. A run of sae or store that was cut off "
        "goes on where it was when the same command is called again at the same commit.",
    )
    parser.add_argument(
        "section",
        nargs="?",
        choices=BENCHES,
        default="ops",
        metavar="|".join(BENCHES),
        help="what to time (default %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--threads", metavar="N", help="of torch on the CPU (default: its own)")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="ops or cases with this text; sae, store: or a part",
    )
    parser.add_argument(
        "--seconds", metavar="X", help="for each candidate (default 0.6; sae: 5; store: 2)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="merge the result into this file, or one in this folder"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="ops, sae, store: measure again what FILE holds for this commit",
    )
    parser.add_argument(
        "--keep-failed", action="store_true", help="ops: do not try again what has failed"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: does it run? times mean nothing"
    )
    parser.add_argument("--compare", metavar="FILE", help="compare with this result file")


def _add_doctor(commands: Any, run: Command) -> None:
    parser = _new(commands, "doctor", "report versions, libraries and what runs where", run)
    parser.add_argument("--json", action="store_true", help="for programs")


def _model(parser: Any) -> None:
    parser.add_argument(
        "--model",
        default="zoo:music",
        metavar="MODEL",
        help="zoo:music or the folder of a saved pipeline (default %(default)s)",
    )


def _method(parser: Any) -> None:
    group = parser.add_argument_group("how the vector is made")
    group.add_argument(
        "--method",
        choices=("caa", "sae"),
        default="caa",
        help="caa: mean difference of activations; sae: decoder rows of the dictionary features "
        "that score best (default %(default)s)",
    )
    group.add_argument(
        "--dictionaries",
        metavar="DIR",
        help="sae: folder with a dictionary for each site, cross-6.safetensors (default: the zoo)",
    )
    group.add_argument(
        "--features", default="20", metavar="N", help="sae: features a step (default %(default)s)"
    )
    group.add_argument(
        "--score", choices=SCORES, default="tada", help="sae: what ranks them (default tada)"
    )
    group.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default="natural",
        help="sae: natural (strength 1 is one natural difference) or as published (none), or by "
        "the scores (default natural)",
    )


def _sampling(parser: Any, *, rows: bool, seed: bool) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", default="20", metavar="N", help="num_inference_steps (default %(default)s)"
    )
    group.add_argument(
        "--guidance", default="3.0", metavar="X", help="guidance_scale (default %(default)s)"
    )
    if seed:
        group.add_argument("--seed", default="0", metavar="N", help="default %(default)s")
    if rows:
        group.add_argument(
            "--batch-rows",
            default="64",
            metavar="N",
            help="clips generated at once (default %(default)s)",
        )
