# SPDX-License-Identifier: Apache-2.0
"""Timing of ops, hooks and training steps against what people would write instead.

`timing` takes samples, `machine` measures what this machine can do at best, `cases` turns a case
into rows, `results` keeps them in one file for each machine. What is timed is in `ops` (one module
for each op), `hooks`, `sae`, `store`, `sharing`, `generation` and `demo`. `config` has the settings
of the command `sidechain bench` and `run` its work, `bench/gpu.sh` runs the same code on a GPU
host, and `bench/test_ops.py` gives the same cases to pytest-benchmark.
"""
