# SPDX-License-Identifier: Apache-2.0
"""The model of a study: one way to load, encode, patch and generate, whatever the pipeline is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._errors import InputError
from ..pipelines import sites
from ..pipelines.generate import generate, quiet_settings
from ..scorers import Samples
from ..scorers.loading import check_finite
from ..taps import contexts
from . import common
from .config import MODEL
from .files import load_pipeline, saved_class

_OUTPUTS = ("audios", "images", "frames")
_RATES = ("sampling_rate", "sample_rate")


@dataclass(frozen=True)
class Context:
    """What a cross-attention site sees of some prompts.

    Attributes:
        states: [B, S, C].
        mask: tokens that it may read, [B, S] bool; None = all.
    """

    states: Tensor
    mask: Tensor | None = None

    def take(self, rows: Any) -> Context:
        """Return the context of some rows."""
        return Context(self.states[rows], None if self.mask is None else self.mask[rows])

    def given(self, how: str) -> dict[str, Any]:
        """Return it as arguments of `patch`, in place of "context", "key" or "value"."""
        return {how: (self.states, self.mask) if how == "context" else self.states}


class Subject(Protocol):
    """A model that is studied.

    Attributes:
        name: as the command line names it.
        pipe: the diffusers pipeline, for taps.
        device: where it runs.
        zoo: whether it is the zoo's music model, which has concepts, prompts and classifiers.
    """

    name: str
    pipe: Any
    device: str
    zoo: bool

    def encode(self, prompts: Sequence[str]) -> Any:
        """Return what `generate` takes for some prompts; indexed by a list of row numbers."""
        ...

    def contexts(self, prompts: Sequence[str], site: str, **call: Any) -> Context:
        """Return what a cross-attention site sees of each prompt."""
        ...

    def fillers(self, prompts: Sequence[str], **call: Any) -> list[str]:
        """Return prompts that have to be in every batch, so that all texts are padded alike."""
        ...

    def call(self, steps: int, guidance: float) -> dict[str, Any]:
        """Return the arguments of every pipeline call, beside prompts and generators."""
        ...

    def generate(self, prompts: Any, seeds: Sequence[int], **call: Any) -> Samples:
        """Generate a sample of each row of `encode`; row i starts from the noise of seeds[i]."""
        ...


class Texts(tuple[str, ...]):
    """Prompts that a pipeline encodes itself, indexed by a list of row numbers."""

    def __getitem__(self, rows: Any) -> Any:
        """Return one prompt, or those of several rows."""
        if isinstance(rows, list | tuple):
            return Texts(super(Texts, self).__getitem__(row) for row in rows)
        return super().__getitem__(rows)


class MusicSubject:
    """The zoo's music model: texts are encoded once, and its scorers read latents."""

    zoo = True

    def __init__(self, pipe: Any, name: str = MODEL) -> None:
        self.pipe, self.name = pipe, name
        self.device = str(pipe.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See `Subject.encode`: text states [B, S, C]."""
        encoded: Tensor = self.pipe.encode_prompt(list(prompts))
        return encoded

    def contexts(self, prompts: Sequence[str], site: str, **call: Any) -> Context:
        """See `Subject.contexts`."""
        return Context(*contexts(self.pipe, list(prompts), site=site, masks=True))

    def fillers(self, prompts: Sequence[str], **call: Any) -> list[str]:
        """See `Subject.fillers`: none, every text has one length."""
        return []

    def call(self, steps: int, guidance: float) -> dict[str, Any]:
        """See `Subject.call`."""
        return {"num_inference_steps": steps, "guidance_scale": guidance}

    def generate(self, prompts: Any, seeds: Sequence[int], **call: Any) -> Samples:
        """See `Subject.generate`: latents, decoded where a scorer listens."""
        latents = common.generate(
            self.pipe,
            prompts,
            seeds,
            steps=call["num_inference_steps"],
            guidance=call["guidance_scale"],
        )
        rate = self.pipe.codec.config.sample_rate
        return Samples(latents=latents, rate=rate, decoder=self._decode)

    def _decode(self, latents: Tensor) -> Tensor:
        waves = self.pipe.codec.audio(self.pipe.codec.decode(latents))
        return torch.stack([torch.as_tensor(wave, dtype=torch.float32) for wave in waves])


class PipelineSubject:
    """Any diffusers pipeline with prompts: sounds or images come out decoded.

    Args:
        pipe: the pipeline.
        name: as messages and tables call it.
        arguments: of every call, such as height=512.

    Raises:
        InputError: parts on several devices, or weights that are not finite.
        TypeError, ValueError: an argument that the pipeline does not know, or that is set here.
    """

    zoo = False

    def __init__(self, pipe: Any, name: str, arguments: dict[str, Any] | None = None) -> None:
        self.pipe, self.name = pipe, name
        self._arguments = dict(arguments or {})
        self.device = _one_device(pipe)
        for part, module in _modules(pipe):
            check_finite(f"model {name}, {part}", module)
        self.call(1, 1.0)

    def encode(self, prompts: Sequence[str]) -> Texts:
        """See `Subject.encode`: the texts themselves."""
        return Texts(prompts)

    def contexts(self, prompts: Sequence[str], site: str, **call: Any) -> Context:
        """See `Subject.contexts`."""
        call = {**call, **_listed(call, len(prompts))}
        return Context(*contexts(self.pipe, list(prompts), site=site, masks=True, **call))

    def fillers(self, prompts: Sequence[str], **call: Any) -> list[str]:
        """See `Subject.fillers`: the longest prompt of every source of text, if they differ.

        Pipelines that pad to the longest text of a batch would give a row another context in
        another batch, and contexts of two prompts would not fit each other.
        """
        every, found = list(dict.fromkeys(prompts)), []
        cross = [site for site in sites(self.pipe) if site.kind == "cross"]
        for site in {site.source: site.alias for site in reversed(cross)}.values():
            tokens = [self.contexts([text], site, **call).states.shape[1] for text in every]
            if len(set(tokens)) > 1:
                found.append(every[tokens.index(max(tokens))])
        return list(dict.fromkeys(found))

    def call(self, steps: int, guidance: float) -> dict[str, Any]:
        """See `Subject.call`.

        Raises:
            TypeError, ValueError: an argument that the pipeline does not know, or that is set here.
        """
        call = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "pt",
            **self._arguments,
        }
        taken = {"num_inference_steps", "guidance_scale", "output_type"} & self._arguments.keys()
        if taken:
            raise InputError(
                f"--call: expected no {', '.join(sorted(taken))} [set by --steps, --guidance and "
                "the scorers], got it"
            )
        known = inspect.signature(type(self.pipe).__call__).parameters
        lost = [key for key in self._arguments if key not in known]
        if lost:  # where a pipeline takes any keyword, it may do nothing with it
            raise InputError(
                f"--call: expected arguments of a {type(self.pipe).__name__} call "
                f"[{', '.join(key for key in known if key != 'self')}], got {lost[0]}"
            )
        return quiet_settings("--call", self.pipe, call)

    def generate(self, prompts: Any, seeds: Sequence[int], **call: Any) -> Samples:
        """See `Subject.generate`: decoded samples.

        Raises:
            InputError: samples that are not finite, or of no kind that can be scored.
        """
        made = generate(self.pipe, list(prompts), seeds, call)
        samples = samples_of(self.pipe, made)
        if len(samples) != len(prompts):
            raise InputError(
                f"model: expected {len(prompts)} samples [one for each prompt], got {len(samples)}"
            )
        return samples.check_finite(list(prompts))


def samples_of(pipe: Any, made: Any) -> Samples:
    """Read what a pipeline returned.

    Raises:
        InputError: neither sounds nor images, or sounds whose rate no part of the pipeline says.
    """
    name = next((name for name in _OUTPUTS if hasattr(made, name)), None)
    found = None if name is None else getattr(made, name)
    if name is None or name == "frames" or found is None:
        raise InputError(
            f"model: expected a pipeline that puts out audios or images [what scorers read], got "
            f"{name or type(made).__name__} of {type(pipe).__name__}"
        )
    data = torch.as_tensor(found).float()
    if name == "audios":
        return Samples(waves=data, rate=_rate(pipe))
    return Samples(images=data)


def _rate(pipe: Any) -> int:
    for part in (pipe, *(getattr(pipe, name, None) for name in ("vocoder", "vae"))):
        for holder in (getattr(part, "config", None), part):
            for name in _RATES:
                rate = getattr(holder, name, None)
                if isinstance(rate, int | float) and rate > 0:
                    return int(rate)
    raise InputError(
        f"model: expected a sampling rate in {type(pipe).__name__}, its vocoder or its vae, got "
        "none"
    )


def _listed(call: dict[str, Any], count: int) -> dict[str, Any]:
    negative = call.get("negative_prompt")
    return {"negative_prompt": [negative] * count} if isinstance(negative, str) else {}


def _modules(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    parts = getattr(pipe, "components", {})
    return [(name, part) for name, part in parts.items() if isinstance(part, torch.nn.Module)]


def _one_device(pipe: Any) -> str:
    """Return the device of all parts; those under offload are moved by their own hooks."""
    found: dict[str, str] = {}
    for name, part in _modules(pipe):
        if not any(hasattr(module, "_hf_hook") for module in part.modules()):
            for weight in part.parameters():
                found.setdefault(str(weight.device), name)
    if len(found) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in found.items())
        raise InputError(f"model: expected all parts on one device, got {places}")
    return next(iter(found), str(getattr(pipe, "device", "cpu")))


def load(config: Any, dtype: str | None = None) -> Subject:
    """Load the model that the settings name.

    Args:
        config: settings of a study: model, revision, call, device, dtype.
        dtype: of the weights; None = that of the settings.

    Raises:
        InputError: no such model, one that cannot be used, or a device that is not there.
    """
    common.check_device(config.device)
    wanted = getattr(torch, dtype or config.dtype)
    if config.model == MODEL or saved_class(config.model) == "MusicPipeline":
        given = [key for key, _ in config.call] + (["--revision"] if config.revision else [])
        if given:
            raise InputError(
                f"--model {config.model}: expected no --call and no --revision [the zoo's music "
                f"model has nothing to set], got {given[0]}"
            )
        from .. import zoo

        pipe = zoo.music(config.device, wanted, None if config.model == MODEL else config.model)
        pipe.set_progress_bar_config(disable=True)
        return MusicSubject(pipe, config.model)
    pipe = load_pipeline(config.model, config.revision, wanted)
    pipe.set_progress_bar_config(disable=True)
    return PipelineSubject(pipe.to(config.device), config.model, dict(config.call))
