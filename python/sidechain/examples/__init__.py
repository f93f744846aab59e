# SPDX-License-Identifier: Apache-2.0
"""Short programs to start from: `python -m sidechain.examples.NAME --out FOLDER`."""
