# SPDX-License-Identifier: Apache-2.0
"""Timing of ops, hooks and training steps against what people would write instead.

`timing` takes samples, `machine` measures what this machine can do at best, `cases` turns a case
into rows, `results` keeps them in one file a machine. What is timed lies in `ops` (one module an
op), `hooks` and `sae`. `sidechain bench` is the command, `bench/gpu.sh` runs the same code on a
GPU host, `bench/test_ops.py` shows the same cases to pytest-benchmark.
"""
