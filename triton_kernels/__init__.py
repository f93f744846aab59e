# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for matrix- and attention-shaped ops, installed as ``sidechain.triton_kernels``."""
