# SPDX-License-Identifier: Apache-2.0
"""Files: atomic writes, tensor files with a JSON header, run folders. The only writer of files."""
