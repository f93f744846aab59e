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
from ..sae.training.train_config import TrainConfig
from ..studies.config import Model
from .builder import Command

if TYPE_CHECKING:
    from ..sae import Source

#: Of `sidechain.sae.LOGGERS`.
LOGGERS = ("tensorboard", "wandb")
#: Settings of `TrainConfig` that have an option of their own.
_OWN = ("tokens", "batch", "lr", "sparsity", "seed")
_DEFAULTS = defaults(TrainConfig)
_LIVE, _SAMPLING = "a site of a running model", "sampling"


def read_features(name: str, value: Any) -> str:
    """Read a number of features, or a multiple of the width such as "8x"."""
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
        ..., "folder of a store, or a site such as cross:3", "STORE|SITE", positional=True
    )
    site: str | None = text(None, "which site of the store", "SITE")
    target: str | None = text(None, "reconstruct this site instead: a transcoder", "SITE")
    architecture: str = choice("batch_topk", "kind of dictionary", tuple(ARCHITECTURES))
    features: str = option("8x", "or a multiple of the width", read_features, metavar="N|Nx")
    k: int | None = whole(None, f"features a token (default {DEFAULT_K}; {taking('k')})", least=1)
    tokens: int = whole(2_000_000, "rows to train on", least=1)
    batch: int = whole(_DEFAULTS["batch"], "rows a step", least=1)
    lr: float | None = number(None, "learning rate (default 2e-4 / sqrt(features / 16384))")
    sparsity: float = number(_DEFAULTS["sparsity"], f"penalty of {taking('sparsity')}", least=0.0)
    seed: int = whole(_DEFAULTS["seed"], "of weights, order and noise", most=2**63 - 1)
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
    train = train_config(settings)

    from .. import sae
    from ..io.run_folder import write_settings

    rows = source(settings)
    config = sae_config(settings, rows)
    out = settings.out or Path(f"runs/sae/{slug(rows)}-{settings.architecture}")
    values.folder_to_write("--out", out)
    trainer = sae.Trainer(
        config,
        train,
        rows,
        out,
        mesh=sae.from_environment(settings.feature_slices),
        device=_device(settings),
        loggers=settings.log,
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


def source(settings: SaeTrainSettings) -> Source:
    """Open a store, or make the source of a site of a running model.

    Raises:
        FileNotFoundError: a path without a store.
        InputError: a site without prompts.
        ValueError: from the store or the site.
    """
    from .. import sae
    from ..store import ActivationStore

    data = settings.data
    if Path(data).is_dir() or "/" in data or "\\" in data:
        store = ActivationStore(data, settings.site)
        aim = None if settings.target is None else ActivationStore(data, settings.target)
        return sae.StoreSource(store, aim, seed=settings.seed)
    if settings.site is not None:
        raise InputError(f"--site: expected a store beside it, got the site {data!r}")
    if settings.prompts is None:
        raise InputError(
            "sae train: expected the folder of a store, or --prompts FILE beside a site, got "
            f"{data!r} alone"
        )
    from ..studies import models

    subject = models.load(replace(settings, device=_device(settings) or "cpu"))
    call = subject.call(settings.steps, settings.guidance)
    call.pop("output_type", None)  # nothing is decoded
    return sae.PipelineSource(
        subject.pipe,
        data,
        settings.prompts,
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


def sae_config(settings: SaeTrainSettings, rows: Source) -> SaeConfig:
    """Return the dictionary that the options describe, for rows of these widths."""
    from ..sae.training.trainer import config_for

    times = rows.widths()[0] if settings.features.endswith("x") else 1
    count = int(settings.features.rstrip("x")) * times
    return config_for(rows, count, architecture=settings.architecture, k=settings.k)


def slug(rows: Source) -> str:
    """Return the name of a source's site as a part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", rows.provenance().site) or "site"


COMMAND = Command(
    SaeTrainSettings,
    run,
    "Train a sparse dictionary on recorded activations, or on the output of a site while the model "
    "generates. The same command again continues from the last checkpoint, bit for bit, also after "
    "a crash; Ctrl-C and SIGTERM save one first. Under torchrun the processes share the work.",
    replays=True,
)
