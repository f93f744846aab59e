# SPDX-License-Identifier: Apache-2.0
"""Training steps of sparse autoencoders, ours beside plain torch and other packages.

`common` holds what all share (shapes, data, start), `plain` torch alone, `peers` other packages,
`ours` our trainer; `race` runs them on the same batches; `memory` measures what a step adds.
"""
