# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae train`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _values as values
from .._errors import InputError
from .._options import choice, defaults, number, option, path, text, whole
from ..sae.architectures.registry import ARCHITECTURES, taking
from ..sae.config import DEFAULT_K, SaeConfig
from ..sae.training.train_config import BAD_ROWS, TrainConfig
from ..studies.config import Model
from .builder import Command

if TYPE_CHECKING:
    from ..sae import Source
    from ..sae.starting import Started

#: Of `sidechain.sae.LOGGERS`.
LOGGERS = ("tensorboard", "wandb")
#: Settings of `TrainConfig` that have an option of their own.
_OWN = ("tokens", "batch", "lr", "l0", "sparsity", "seed", "on_bad_rows")
#: Rows to train on of a store or a running model.
TOKENS = 2_000_000
FEATURES = "8x"
_OTHERS, _FILES = "another dictionary or run", "own activations"
_DEFAULTS = defaults(TrainConfig)
_LIVE, _SAMPLING = "a site of a running model", "sampling"


def read_features(name: str, value: Any) -> str | None:
    """Read a number of features, or a multiple of the width such as "8x"."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)x?", str(value).strip())
    if match is None or int(match[1]) < 1:
        raise InputError(f"{name}: expected N or Nx, got {value!r}")
    return match[0]


def read_set(name: str, value: Any) -> tuple[str, ...]:
    """Read NAME=VALUE of `TrainConfig`."""
    known = sorted({f.name for f in fields(TrainConfig)} - set(_OWN))
    for pair in value:
        if "=" not in pair or pair.partition("=")[0] not in known:
            raise InputError(
                f"{name}: expected NAME=VALUE with a name of {', '.join(known)}, got {pair!r}"
            )
    return tuple(value)


def _loggers(name: str, value: Any) -> tuple[str, ...]:
    return values.words(LOGGERS)(name, value)


@dataclass(frozen=True, kw_only=True)
class SaeTrainSettings(Model):
    """Options of `sidechain sae train`."""

    data: str = text(
        ...,
        "folder of a store, a file or folder of own activations (.npy, .safetensors, .pt, "
        ".parquet, .arrow), or a site such as cross:3",
        "STORE|FILE|SITE",
        positional=True,
    )
    site: str | None = text(None, "which site of the store", "SITE")
    target: str | None = text(
        None,
        "reconstruct this site (of own activations: this file) instead: a transcoder",
        "SITE|FILE",
    )
    architecture: str | None = choice(
        None,
        f"kind of dictionary (default {SaeConfig.architecture}, or that of --start)",
        tuple(ARCHITECTURES),
    )
    features: str | None = option(
        None,
        f"or a multiple of the width (default {FEATURES}, or those of --start)",
        read_features,
        metavar="N|Nx",
    )
    k: int | None = whole(None, f"features a token (default {DEFAULT_K}; {taking('k')})", least=1)
    tokens: int | None = whole(
        None,
        f"rows to train on (default {TOKENS}; of own activations all, --epochs times)",
        least=1,
    )
    batch: int = whole(
        _DEFAULTS["batch"], "rows a step (default 4096, in short runs a thousandth of the tokens)"
    )
    lr: float | None = number(None, "learning rate (default 2e-4 / sqrt(features / 16384))")
    l0: float | None = number(
        None,
        f"features a token that the penalty leaves (default {DEFAULT_K}; {taking('sparsity')})",
    )
    sparsity: float | None = number(None, "fixed penalty instead of --l0", least=0.0)
    seed: int = whole(_DEFAULTS["seed"], "of weights, order and noise", most=2**63 - 1)
    on_bad_rows: str = choice(
        _DEFAULTS["on_bad_rows"], "at a row that is not finite", tuple(BAD_ROWS)
    )
    set: tuple[str, ...] = option(
        (),
        "any other setting of sidechain.sae.TrainConfig, such as aux_k=0; may be repeated "
        "(default: none)",
        read_set,
        metavar="NAME=VALUE",
        many="append",
    )
    log: tuple[str, ...] = option(
        (),
        "beside metrics.jsonl: tensorboard,wandb, where installed (default: none)",
        _loggers,
        metavar="LIST",
        empty=True,
    )
    feature_slices: int = whole(1, "under torchrun: processes that share one dictionary", least=1)
    device: str | None = option(  # type: ignore[assignment]  # None is a choice of its own here
        None,
        "cpu, cuda, cuda:N, xpu or mps (default: weights on CUDA where there is one, the model on "
        "the CPU)",
        values.device,
        metavar="DEVICE",
        group="model",
        replayed=False,
    )
    start: str | None = text(
        None,
        "dictionary to start from: file or folder of any format, folder of a finished run, hub id",
        "DICTIONARY",
        group=_OTHERS,
    )
    reason: str = text(
        "",
        "why settings differ from those of the run in --out, which goes on",
        "TEXT",
        group=_OTHERS,
        empty=True,
        replayed=False,
    )
    column: str | None = text(
        None, "of a table, or name of the tensor in a file", "NAME", group=_FILES
    )
    row_steps: Path | None = path(
        None,
        ".npy file with the scheduler step of each row",
        "FILE",
        values.file_there,
        group=_FILES,
    )
    epochs: int | None = whole(None, "times through the rows (default 1)", least=1, group=_FILES)
    held_out: float = number(
        0.0, "share of the rows to measure on instead, at the end", least=0.0, group=_FILES
    )
    prompts: tuple[str, ...] | None = option(
        None,
        "text file, one prompt per line",
        lambda name, value: None if value is None else values.lines(name, value),
        metavar="FILE",
        group=_LIVE,
    )
    every: int = whole(1, "keep every Nth step", least=1, group=_LIVE)
    buffer: int = whole(262_144, "rows shuffled together", least=1, group=_LIVE)
    steps: int = whole(20, "num_inference_steps", least=1, group=_SAMPLING)
    guidance: float = number(3.0, "guidance_scale", least=0.0, group=_SAMPLING)
    out: Path | None = path(
        None,
        "folder of the run (default runs/sae/SITE-ARCHITECTURE)",
        "DIR",
        values.folder_to_write,
        replayed=False,
    )


def run(settings: SaeTrainSettings, given: Mapping[str, Any]) -> int:
    """Train and print the path of the dictionary."""
    train_config(replace(settings, tokens=settings.tokens or TOKENS))  # before anything is opened

    from .. import sae
    from ..io.run_folder import write_settings
    from ..sae.starting import opened
    from ..sae.training.run_record import recorded_batch
    from ..sae.training.train import whole_run

    start = None if settings.start is None else opened(settings.start)
    rows, held_out = source(settings)
    config = sae_config(settings, rows, start)
    out = settings.out or Path(f"runs/sae/{slug(rows)}-{config.architecture}")
    values.folder_to_write("--out", out)
    batch, tokens = settings.batch or recorded_batch(out), settings.tokens
    if tokens is None:
        tokens = whole_run(rows, batch) if own_files(settings.data) else TOKENS
    trainer = sae.Trainer(
        config,
        train_config(replace(settings, tokens=tokens, batch=batch)),
        rows,
        out,
        mesh=sae.from_environment(settings.feature_slices),
        device=_device(settings),
        loggers=settings.log,
        start=start,
        reason=settings.reason,
        held_out_rows=held_out,
    )
    trainer.claim()
    if trainer.mesh.first:
        write_settings(out, "sae train", settings)
    trainer.run()
    if trainer.mesh.first:
        print(trainer.result)
    return 0


def train_config(settings: SaeTrainSettings) -> TrainConfig:
    """Return the training settings; values of --set as in JSON, words without quotes."""
    found: dict[str, Any] = {name: getattr(settings, name) for name in _OWN}
    for pair in settings.set:
        name, _, word = pair.partition("=")
        try:
            value = json.loads({"none": "null"}.get(word.lower(), word))
        except ValueError:
            value = word
        found[name] = tuple(value) if isinstance(value, list) else value
    return TrainConfig(**found)


def own_files(data: str) -> bool:
    """Return whether the words name a file or folder that is no store."""
    place = Path(data)
    if place.is_dir():
        return not (place / "manifest.json").is_file()
    return place.is_file() or place.suffix in (".npy", ".pt", ".pth", ".safetensors", ".parquet")


def source(settings: SaeTrainSettings) -> tuple[Source, Any]:
    """Open a store or own activations, or make the source of a site of a running model.

    Returns:
        The source, and the rows that are held out of it.

    Raises:
        FileNotFoundError: a path without rows.
        InputError: a site without prompts.
        ValueError: from the rows or the site.
    """
    from .. import sae
    from ..store import ActivationStore

    data = settings.data
    if own_files(data):
        return _own_source(settings)
    for name in ("column", "row_steps", "held_out"):
        if getattr(settings, name):
            raise InputError(
                f"--{name.replace('_', '-')}: expected a file or folder of own activations with "
                f"it, got {data!r}"
            )
    if Path(data).is_dir() or "/" in data or "\\" in data:
        store = ActivationStore(data, settings.site)
        aim = None if settings.target is None else ActivationStore(data, settings.target)
        return sae.StoreSource(store, aim, seed=settings.seed, epochs=settings.epochs), None
    if settings.site is not None:
        raise InputError(f"--site: expected a store beside it, got the site {data!r}")
    if settings.prompts is None:
        raise InputError(
            "sae train: expected the folder of a store, a file of own activations, or --prompts "
            f"FILE beside a site, got {data!r} alone"
        )
    return _live_source(settings), None


def _own_source(settings: SaeTrainSettings) -> tuple[Source, Any]:
    from ..sae.training.opening import source_of
    from ..sae.training.options import DataOptions
    from .row_steps import read_steps

    if settings.site is not None:
        raise InputError(f"--site: expected a store beside it, got the file {settings.data!r}")
    options = DataOptions(
        target=settings.target,
        steps=read_steps("--row-steps", settings.row_steps),
        column=settings.column,
        epochs=settings.epochs,
        held_out=settings.held_out,
        seed=settings.seed,
    )
    return source_of(settings.data, options)


def _live_source(settings: SaeTrainSettings) -> Source:
    from .. import sae
    from ..studies import models

    subject = models.load(replace(settings, device=_device(settings) or "cpu"))
    call = subject.call(settings.steps, settings.guidance)
    call.pop("output_type", None)  # nothing is decoded
    return sae.PipelineSource(
        subject.pipe,
        settings.data,
        settings.prompts or (),
        target=settings.target,
        every=settings.every,
        buffer=settings.buffer,
        seed=settings.seed,
        **call,
    )


def _device(settings: SaeTrainSettings) -> str | None:
    from ..studies.common import check_device

    if settings.device is not None:
        check_device(settings.device)
    return settings.device


def sae_config(settings: SaeTrainSettings, rows: Source, start: Started | None) -> SaeConfig:
    """Return the dictionary that the options describe, for rows of these widths."""
    from ..sae.training.train import config_for

    words = settings.features or (FEATURES if start is None else None)
    count = None
    if words is not None:
        count = int(words.rstrip("x")) * (rows.widths()[0] if words.endswith("x") else 1)
    asked = {"k": settings.k, "architecture": settings.architecture}
    shape: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return config_for(rows, count, None if start is None else start.sae, **shape)


def slug(rows: Source) -> str:
    """Return the name of a source's site as a part of a path."""
    known = rows.provenance()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", known.site or known.source) or "site"


COMMAND = Command(
    SaeTrainSettings,
    run,
    "Train a sparse dictionary on recorded activations, or on the output of a site while the model "
    "generates. The same command again continues from the last checkpoint, bit for bit, also after "
    "a crash; Ctrl-C and SIGTERM save one first. Under torchrun the processes share the work.",
    replays=True,
)
