# SPDX-License-Identifier: Apache-2.0
"""`python -m sidechain`: the command line; without arguments the environment report."""

import sys

from sidechain.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
