# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, matrix- and attention-shaped; installed as ``sidechain.triton_kernels``."""
