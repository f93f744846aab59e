# SPDX-License-Identifier: Apache-2.0
"""record: run a pipeline over prompts and stream what its sites put out into a store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .._errors import InputError
from ..io.same import difference
from ..pipelines import SitePattern, config_hash
from ..pipelines.generate import (
    Sampling,
    generate,
    model_name,
    quiet_settings,
    spread_seeds,
)
from ..taps.options import BRANCHES, Where
from ..taps.stream import StepRows, StreamTap
from .manifest import MANIFEST, Manifest, read_prompts
from .options import Storage
from .reader import ActivationStore
from .writer import ActivationWriter


def record(
    pipe: Any,
    where: Where | SitePattern,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    every: int = 1,
    sampling: Sampling | None = None,
    storage: Storage | None = None,
    progress: bool = True,
    **call: Any,
) -> dict[str, ActivationStore]:
    """Record every token that attention sites put out, for all prompts, into a store.

    The rows are what `capture(reduce="tokens")` sees: the output of the module before its residual.
    They leave the device step by step, so memory does not grow with steps or prompts. A call that
    was cut off is continued by the same call: prompts that are in the store are not run again.
    More prompts than before, with the old ones first, extend a store.

    Args:
        pipe: diffusers pipeline.
        where: sites, all recorded in one generation; branches, steps, a slice of tokens.
        prompts: texts; number i labels the rows of the i-th.
        folder: of the store; made if it is not there.
        every: keep one step in so many of these, the first included.
        sampling: seeds, and prompts in one call; None = `Sampling()`.
        storage: dtype and sizes of the files; None = `Storage()`.
        progress: show a progress bar.
        **call: arguments of every pipeline call (num_inference_steps, guidance_scale, ...).

    Returns:
        The store of every site, by alias.

    Raises:
        TypeError, ValueError: options, or a store there that was made with others.
        OSError: a full disk; what was complete is intact and the same call continues.
    """
    sampling, storage = sampling or Sampling(), storage or Storage()
    texts, batch_size = _texts(prompts), sampling.batch_size
    _positive("batch_size", batch_size)
    _positive("every", every)
    where = Where.of(where)
    chosen = where.chosen(pipe, "*")
    all_seeds = spread_seeds("record", sampling.seeds, len(texts))
    settings = quiet_settings("record", pipe, call)
    recorder = _Recorder()
    ring_dtype = torch.float32 if storage.dtype == torch.int8 else storage.dtype
    tap = StreamTap(pipe, where, every, ring_dtype, recorder.take)
    facts = _facts(pipe, where, every, call)
    folder = Path(folder)
    _check_same(folder, facts, texts, all_seeds)
    writer = ActivationWriter(
        folder,
        {site.alias: site.width for site in chosen},
        storage,
        branches=BRANCHES,
        mode="resume",
        provenance=facts,
    )
    first, count = writer.cursor, len(texts)
    bar = tqdm(total=count, initial=first, desc="record", unit="prompt", disable=not progress)
    with bar, writer:
        writer.set_prompts(texts, all_seeds)
        recorder.writer = writer
        with tap if first < count else contextlib.nullcontext():
            for start in range(first, count, batch_size):
                stop = min(start + batch_size, count)
                recorder.first = start
                with writer.transaction(cursor=stop):
                    generate(pipe, texts[start:stop], all_seeds[start:stop], settings)
                    tap.end()
                bar.update(stop - start)
                bar.set_postfix_str(f"{recorder.rows} rows", refresh=False)
    return {site.alias: ActivationStore(folder, site.alias) for site in chosen}


class _Recorder:
    """Labels the rows of a step and gives them to the writer."""

    writer: ActivationWriter

    def __init__(self) -> None:
        self.first = 0  # number of the prompt of the first sample
        self.rows = 0

    def take(self, found: StepRows) -> None:
        """Write one step."""
        generation = found.generation
        self.writer.set_grid(generation.timesteps, generation.sigmas)
        prompt = self.first + np.arange(found.samples)
        length = len(found.tokens)
        branch = np.array([BRANCHES.index(name) for name in found.branches])
        self.writer.write(
            found.rows,
            step=found.step,
            branch=np.repeat(branch, found.samples * length),
            prompt=np.tile(np.repeat(prompt, length), len(branch)),
            token=np.tile(np.array(found.tokens), found.samples * len(branch)),
            copy=False,
            ready=found.ready,
        )
        self.rows += found.samples * length * len(branch)


def _texts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"record: expected prompts as a list of str, got {prompts!r}")
    if not len(prompts):
        raise ValueError("record: expected at least one prompt, got none")
    return list(prompts)


def _facts(pipe: Any, where: Where, every: int, call: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a recording is continued."""
    return {
        "model": model_name(pipe),
        "config_hash": config_hash(pipe),
        "sites": {site.alias: site.name for site in where.chosen(pipe, "*")},
        # "passes": as stores of every version call the branches.
        "passes": where.branches or "cond",
        "steps": where.steps,
        "every": every,
        "tokens": None if where.tokens is None else str(where.tokens),
        "call": {k: v for k, v in call.items() if isinstance(v, str | int | float | None)},
    }


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"record: expected {name} >= 1, got {value!r}")


def _check_same(folder: Path, facts: dict[str, Any], texts: list[str], seeds: list[int]) -> None:
    """Refuse to continue a store that was recorded in another way."""
    if not (folder / MANIFEST).exists():
        return
    manifest = Manifest.read(folder)
    other = difference({name: manifest.provenance.get(name) for name in facts}, facts)
    if other is not None:
        name, there, value = other
        raise InputError(
            f"record: expected {name}={there!r} [how {folder} was recorded], got {value!r}"
        )
    known = read_prompts(folder, manifest)
    for name, new in (("prompts", texts), ("seeds", seeds)):
        old = known[name]
        if new[: len(old)] != old:
            raise ValueError(
                f"record: expected {name} that begin with the {len(old)} of {folder}, got others"
            )
