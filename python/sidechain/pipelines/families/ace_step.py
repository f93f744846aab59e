# SPDX-License-Identifier: Apache-2.0
"""ACE-Step 1.5: guidance rows in the order cond, null, and only within an interval of steps."""

from __future__ import annotations

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..sites import Site


def _tokens(site: Site, shape: CallShape) -> int:
    return -(-shape.latent[0] // int(site.config["patch_size"]))  # padded to whole patches


register_adapter(
    "AceStepTransformer1DModel",
    Adapter(
        family="ace_step",
        components=("transformer",),
        branches={1: ("cond",), 2: ("cond", "uncond")},
        shape=call_shape((0, "hidden_states"), (3, "encoder_hidden_states")),
        late_guidance=True,
        tokens=_tokens,
        timestep=call_timestep(1),
    ),
)
