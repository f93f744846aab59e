# SPDX-License-Identifier: Apache-2.0
"""What dictionaries learned: health on fresh captions, features of concepts."""
