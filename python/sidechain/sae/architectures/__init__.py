# SPDX-License-Identifier: Apache-2.0
"""Architectures of dictionaries: one file and one row of `registry.ARCHITECTURES` for each.

The registry says what settings, messages and the command line need to know, and imports no torch.
A file says how its architecture encodes, learns and is kept by other libraries; it is imported when
a dictionary is made. These files stand below `model` and `training`, which hand themselves in.
"""
