# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch definition of every op: the fallback, the oracle and the baseline."""
