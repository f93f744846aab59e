# SPDX-License-Identifier: Apache-2.0
"""The work of `bench/gpu.sh` on a GPU host that is available for half an hour, in three calls.

`plan` lists what a call does and how long each unit may take, `work` does it, `session` runs
processes and keeps the result file, `journal` writes down every test as it ends, `aims` compares
the figures with what they should be, `__main__` is the command line.
"""
