# SPDX-License-Identifier: Apache-2.0
"""Name the schedulers of the tiny pipelines."""

from __future__ import annotations

from typing import Any

# Noise of the published image models; the default of diffusers makes random denoisers explode.
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Name -> class of diffusers and its settings.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "edm": ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "cosine": ("CosineDPMSolverMultistepScheduler", {"solver_order": 2}),  # stochastic
    "ddim": (
        "DDIMScheduler",
        {**_BETAS, "clip_sample": False, "set_alpha_to_one": False},
    ),
    "ddpm": ("DDPMScheduler", {}),  # stochastic
    "euler": (
        "EulerDiscreteScheduler",
        {**_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "dpm": ("DPMSolverMultistepScheduler", _BETAS),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "pingpong": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),  # stochastic
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    # Sigmas are timesteps, as ACE-Step and Stable Audio 3 hand them over.
    "flow_unit": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1, "shift": 1.0}),
    "flow_inverted": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "invert_sigmas": True}),
}


def make_scheduler(scheduler: Any) -> Any:
    """Make a scheduler from its name; an object is returned as it is.

    Raises:
        ValueError: an unknown name.
    """
    import diffusers

    if not isinstance(scheduler, str):
        return scheduler
    if scheduler not in SCHEDULERS:
        known = ", ".join(repr(name) for name in SCHEDULERS)
        raise ValueError(
            f"tiny_pipeline: expected scheduler {known} or an object, got {scheduler!r}"
        )
    name, settings = SCHEDULERS[scheduler]
    return getattr(diffusers, name)(**settings)
