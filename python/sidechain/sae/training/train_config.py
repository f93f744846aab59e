# SPDX-License-Identifier: Apache-2.0
"""Settings of training, and their values at a given step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any

from ..architectures.registry import ARCHITECTURES, taking
from ..config import DEFAULT_K, SaeConfig

SCHEDULES = ("linear", "cosine", "constant")
NORMALISATIONS = ("step", "global", "none")
BIAS_INITS = ("mean", "geometric_median", "zero")
PENALTIES = ("tanh", "l0")
PATHS = ("auto", "fused", "autograd")
PRECISIONS = ("fp32", "bf16", "int8")
#: As `sidechain.store.finite.POLICIES`; settings alone need no torch.
BAD_ROWS = ("error", "skip")

# Rows of a step, at most, and steps of a run, at least, see `TrainConfig.batch`.
_BATCH, _SMALLEST, _STEPS = 4096, 256, 1000
# Learning rate of short runs in sizes of an element, see `TrainConfig.lr`.
_TURNS, _FASTEST = 100.0, 1 / 8
# Learning rate and least first value of thresholds, see `TrainConfig.threshold_lr`.
_FOLDS, _FASTEST_FOLD, _LEAST_LIMIT = 20.0, 0.03, 0.1

_CHOICES = {
    "decay": SCHEDULES,
    "normalise": NORMALISATIONS,
    "bias_init": BIAS_INITS,
    "penalty": PENALTIES,
    "path": PATHS,
    "precision": PRECISIONS,
    "on_bad_rows": BAD_ROWS,
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training.

    The loss is (1 / N) sum_n [|e_n|^2 + further terms] / d_out over normalised rows, so that the
    reconstruction part is close to the fraction of variance unexplained and the coefficients of
    further terms are those of the papers, which set them beside |e|^2.

    Attributes:
        tokens: rows to train on; the run is tokens // batch steps.
        batch: N, rows of a step over all processes; 0 = 4096, or in a run of fewer than 4 million
            rows the power of two that gives it a thousand steps, at least 256.
        lr: learning rate; None = 2e-4 / sqrt(F / 2^14) (arXiv 2406.04093), or in a short run
            min(1/8, 100 / steps) / sqrt(d_in), at most 0.01, if that is more: Adam moves an element
            by about lr a step and the elements of a row of norm 1 are 1 / sqrt(d_in), so that a
            slower rate would not turn a row from where it was drawn to where it belongs. No step
            moves an element by more than an eighth of its size.
        warmup: share of the steps over which lr rises linearly from 0.
        decay: "linear" and "cosine" fall to 0 over the last `decay_share`; or "constant".
        decay_share: share of the steps.
        betas, eps, weight_decay: of AdamW (`weight_decay` of the matrices only).
        clip: limit of the global gradient norm; None = none.
        normalise: "step" (mean and scale of each step), "global", "none".
        centre: whether the normaliser subtracts the mean; it prevents most dead features
            (arXiv 2605.31518).
        bias_init: start of `b_dec`, from the first batch.
        seed: of the weights, the order of the data and resampling.
        path: "fused" (no autograd, no gradient tensors: topk, batch_topk, and matryoshka of up
            to 16 prefixes), "autograd", or "auto".
        precision: of the encoder, see `sidechain.ops.topk_encode`; bf16: on a GPU only; autograd:
            fp32 only.
        k_start: features selected at the beginning; None = k.
        k_anneal: share of the steps in which k falls linearly from `k_start`.
        multi_k: topk only: a second reconstruction from this many features (arXiv 2406.04093,
            appendix A.5); None = none.
        multi_weight: its weight.
        threshold_decay: of the running mean of the smallest value that a batch selects
            (batch_topk, matryoshka).
        aux_k: dead features that reconstruct the residual; None = d_out / 2; 0 = none.
        aux_weight: its weight.
        dead_tokens: a feature that did not fire for this many rows is dead; None = a tenth of the
            run, at most 10 million.
        dead_every: steps between updates of the dead mask.
        resample: share of the steps between resamplings of dead features; 0 = never
            (Bricken et al. 2023). Not in the last quarter of the run.
        l0: active features of a row that the penalty of relu, gated and jumprelu is to leave; its
            coefficient follows the count (`L0Control`). None = 32, or F / 4 if that is less, unless
            `sparsity` is given.
        sparsity: fixed coefficient of that penalty instead. Where E|y|^2 = d an active value is
            about sqrt(d / L0) and takes d / L0 from the squared error: what leaves L0 active grows
            as sqrt(d / L0) in relu and gated and as d / L0 in jumprelu, which is why no one number
            fits all widths.
        sparsity_warmup: share of the steps over which a fixed coefficient rises linearly from 0.
        penalty: of jumprelu: "tanh" (Anthropic, Circuits Updates January 2025: tanh(c v |w_dec|),
            c = 4, and `pre_act`), or "l0" (arXiv 2407.14435: the count itself; its gradient
            reaches the thresholds alone).
        pre_act: coefficient of relu(threshold - z) |w_dec| with penalty "tanh", which gives dead
            features a gradient.
        bandwidth: of the rectangle kernel; None = 2 (tanh) or 1 (l0): pre-activations spread by
            about 1 around a threshold at every width, as encoder rows start with norm 1 and
            E|y|^2 = d. The 0.001 of arXiv 2407.14435 belongs to inputs of norm 1 and runs of
            billions of rows: here few or no rows of a batch would reach a threshold.
        threshold_init: first limit of every feature (threshold, or minus the bias of relu or of
            the gate); None = each fires in l0 / F of the rows: Phi^-1(1 - l0 / F) times the spread
            of its pre-activation in the first batch, at least 0.1 times (as Anthropic, Circuits
            Updates January 2025, sets the biases). Where all features start active, the penalty
            shrinks those that fit before they fit.
        threshold_lr: learning rate of the logarithms of jumprelu's thresholds; None = 20 / steps,
            at most 0.03, or lr if that is more. Adam moves a logarithm by about lr a step whatever
            the size of the penalty, which would otherwise change nothing in a short run.
        log_every: steps between metrics.
        checkpoint_minutes: longest time between checkpoints.
        on_bad_rows: at a row that is not finite, or whose square is not: "error" stops before the
            step; "skip" leaves it out, reads another in its place where rows are read by number,
            and counts it in the dictionary's provenance.
        bf16_moments: keep Adam's running statistics of the matrices in bfloat16, rounded
            stochastically (fused path only).
    """

    tokens: int
    batch: int = 0
    lr: float | None = None
    warmup: float = 0.05
    decay: str = "linear"
    decay_share: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    normalise: str = "step"
    centre: bool = True
    bias_init: str = "mean"
    seed: int = 0
    path: str = "auto"
    precision: str = "fp32"
    k_start: int | None = None
    k_anneal: float = 0.2
    multi_k: int | None = None
    multi_weight: float = 1 / 8
    threshold_decay: float = 0.999
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    dead_tokens: int | None = None
    dead_every: int = 100
    resample: float = 0.0
    l0: float | None = None
    sparsity: float | None = None
    sparsity_warmup: float = 0.05
    penalty: str = "tanh"
    pre_act: float = 3e-6
    bandwidth: float | None = None
    threshold_init: float | None = None
    threshold_lr: float | None = None
    log_every: int = 100
    checkpoint_minutes: float = 10.0
    on_bad_rows: str = "error"
    bf16_moments: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"TrainConfig: expected {name} to be one of {', '.join(known)}, got {value!r}"
                )
        _whole("batch", self.batch, 0)
        for name in ("tokens", "dead_every", "log_every"):
            _whole(name, getattr(self, name), 1)
        object.__setattr__(self, "batch", self.batch or default_batch(self.tokens))
        for name in ("k_start", "multi_k", "dead_tokens"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        if self.aux_k is not None:
            _whole("aux_k", self.aux_k, 0)
        if self.tokens < self.batch:
            raise ValueError(
                f"TrainConfig: expected tokens >= {self.batch} [one batch], got {self.tokens}"
            )
        for name in ("warmup", "decay_share", "k_anneal", "resample", "sparsity_warmup"):
            _number(name, getattr(self, name), 0.0, 1.0)
        for name in ("lr", "clip", "bandwidth", "threshold_init", "threshold_lr", "l0"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0.0, math.inf, above=True)
        for name in (
            "eps", "weight_decay", "multi_weight", "aux_weight", "pre_act", "checkpoint_minutes",
        ):  # fmt: skip
            _number(name, getattr(self, name), 0.0, math.inf)
        if self.sparsity is not None:
            _number("sparsity", self.sparsity, 0.0, math.inf)
            if self.l0 is not None:
                raise ValueError(
                    "TrainConfig: expected either l0 or sparsity [l0 sets the coefficient], got "
                    f"l0={self.l0} and sparsity={self.sparsity}"
                )
        for beta in (*self.betas, self.threshold_decay):
            if not 0 <= beta < 1:
                raise ValueError(
                    f"TrainConfig: expected betas and threshold_decay in [0, 1), got {beta}"
                )

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.tokens // self.batch

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read what `to_json` gave.

        Raises:
            ValueError: unknown names or values that do not fit.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"TrainConfig: expected settings of {sorted(known)}, got {unknown}")
        return cls(**{**values, "betas": tuple(values.get("betas", (0.9, 0.999)))})


def default_batch(tokens: int) -> int:
    """Return the rows of a step where none are asked for; see `TrainConfig.batch`."""
    return min(_BATCH, max(_SMALLEST, 1 << max(0, (tokens // _STEPS).bit_length() - 1)))


class Schedule:
    """Values of the settings at a step, counted from 0.

    Raises:
        ValueError: settings that do not fit the architecture.
        NotImplementedError: settings that the chosen path does not have.
    """

    def __init__(self, config: SaeConfig, train: TrainConfig) -> None:
        self.config, self.train = config, train
        self.fused = self._choose_path()
        self._check()

    def _choose_path(self) -> bool:
        from ...ops.sae_update import PREFIXES_MOST  # settings alone need no torch

        fused, levels = self.config.kind.fused, len(self.config.prefixes)
        can = fused and levels <= PREFIXES_MOST
        if self.train.path == "fused" and not can:
            known = ", ".join(name for name, found in ARCHITECTURES.items() if found.fused)
            got = repr(self.config.architecture)
            raise NotImplementedError(
                f"TrainConfig: expected an architecture of {known} with at most {PREFIXES_MOST} "
                "prefixes and path='fused', got "
                + (f"{got} with {levels} prefixes" if fused else got)
            )
        return can and self.train.path != "autograd"

    def _check(self) -> None:
        config, train = self.config, self.train
        if not self.fused and train.precision != "fp32":
            raise NotImplementedError(
                f"TrainConfig: expected precision='fp32' [autograd path], got {train.precision!r}"
            )
        if not self.fused and train.bf16_moments:
            raise NotImplementedError(
                "TrainConfig: expected bf16_moments=False [autograd path], got True"
            )
        if train.k_start is not None and (
            not config.kind.takes("k_start")
            or not (config.k or 0) <= train.k_start <= config.features
        ):
            raise ValueError(
                f"TrainConfig: expected k_start between {config.k} [k] and {config.features} "
                f"[features] or None, got {train.k_start}"
            )
        if train.multi_k is not None:
            if not config.kind.takes("multi_k") or train.k_start is not None:
                raise ValueError(
                    f"TrainConfig: expected architecture={taking('multi_k')!r} and no k_start with "
                    f"multi_k, got {config.architecture!r} and k_start={train.k_start}"
                )
            if not (config.k or 0) < train.multi_k <= config.features:
                raise ValueError(
                    f"TrainConfig: expected multi_k above {config.k} [k] and at most "
                    f"{config.features} [features], got {train.multi_k}"
                )
        self._check_l0()
        if train.resample and train.aux_k:
            raise ValueError(
                "TrainConfig: expected either resample or aux_k [both revive dead features], got "
                f"resample={train.resample} and aux_k={train.aux_k}"
            )

    def _check_l0(self) -> None:
        config, l0 = self.config, self.train.l0
        if l0 is None:
            return
        if not config.kind.takes("sparsity"):
            raise ValueError(
                f"TrainConfig: expected no l0 with architecture={config.architecture!r} [k says "
                f"how many features fire], got {l0}"
            )
        if l0 >= config.features:
            raise ValueError(f"TrainConfig: expected l0 < {config.features} [features], got {l0}")

    @property
    def base_lr(self) -> float:
        """Learning rate where none is asked for."""
        long = 2e-4 / math.sqrt(self.config.features / 2**14)
        short = min(_FASTEST, _TURNS / self.train.steps) / math.sqrt(self.config.d_in)
        return max(long, min(short, 0.01))

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        train = self.train
        base = self.base_lr if train.lr is None else train.lr
        warm = round(train.warmup * train.steps)
        if step < warm:
            return base * (step + 1) / warm
        share = (train.steps - step) / max(1.0, train.decay_share * train.steps)
        if train.decay == "constant" or share >= 1:
            return base
        return base * (share if train.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * share))

    def k(self, step: int) -> int:
        """Return how many features are selected at a step."""
        k, start = self.config.k or 0, self.train.k_start
        length = self.train.k_anneal * self.train.steps
        if start is None or step >= length:
            return k
        return round(start + (k - start) * step / length)

    @property
    def l0(self) -> float | None:
        """Active features that a penalty is to leave; None = there is none, or it is fixed."""
        if self.train.sparsity is not None or not self.config.kind.takes("sparsity"):
            return None
        return self._usual_l0 if self.train.l0 is None else self.train.l0

    @property
    def _usual_l0(self) -> float:
        return min(DEFAULT_K, self.config.features / 4)

    def sparsity(self, step: int) -> float:
        """Return the fixed coefficient of the penalty at a step."""
        length = self.train.sparsity_warmup * self.train.steps
        return (self.train.sparsity or 0.0) * min(1.0, (step + 1) / max(1.0, length))

    def threshold_decay(self, step: int) -> float:
        """Return the decay of the running threshold; short at first: the start is forgotten."""
        return min(self.train.threshold_decay, (1 + step) / (10 + step))

    @property
    def aux_k(self) -> int:
        """Number of dead features that reconstruct the residual; 0 = none."""
        train = self.train
        if not self.config.kind.takes("aux_k") or train.resample or not train.aux_weight:
            return 0
        return self.config.width_out // 2 if train.aux_k is None else train.aux_k

    @property
    def dead_steps(self) -> int:
        """Number of steps without firing after which a feature is dead."""
        train = self.train
        rows = (
            min(10_000_000, train.tokens // 10)
            if train.dead_tokens is None
            else (train.dead_tokens)
        )
        return max(1, rows // train.batch)

    def updates_dead(self, step: int) -> bool:
        """Return whether the dead mask is updated before a step."""
        return step > 0 and step % self.train.dead_every == 0

    def resamples(self, step: int) -> bool:
        """Return whether dead features are resampled after a step."""
        every = round(self.train.resample * self.train.steps)
        return bool(every) and (step + 1) % every == 0 and step < 0.75 * self.train.steps

    @property
    def bandwidth(self) -> float:
        """Width of the rectangle kernel of jumprelu."""
        usual = 2.0 if self.train.penalty == "tanh" else 1.0
        return usual if self.train.bandwidth is None else self.train.bandwidth

    @property
    def first_limit(self) -> float:
        """First limit of a feature whose pre-activation has a spread of 1."""
        if self.train.threshold_init is not None:
            return self.train.threshold_init
        share = (self.l0 or self._usual_l0) / self.config.features
        return max(_LEAST_LIMIT, NormalDist().inv_cdf(1 - share))

    def threshold_lr(self, step: int) -> float:
        """Return the learning rate of the logarithms of trained thresholds at a step."""
        train, lr = self.train, self.lr(step)
        base = self.base_lr if train.lr is None else train.lr
        usual = max(base, min(_FASTEST_FOLD, _FOLDS / train.steps))
        return lr / base * (usual if train.threshold_lr is None else train.threshold_lr)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"TrainConfig: expected {name} as int, got {value!r}")
    if value < least:
        raise ValueError(f"TrainConfig: expected {name} >= {least}, got {value}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"TrainConfig: expected {name} as a number, got {value!r}")
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
        limits = f"above {low:g}" if above else f"between {low:g} and {high:g}"
        raise ValueError(f"TrainConfig: expected {name} {limits}, got {value}")
