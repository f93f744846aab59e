# SPDX-License-Identifier: Apache-2.0
"""Quality of dictionaries on fresh captions, and their features of concepts."""
