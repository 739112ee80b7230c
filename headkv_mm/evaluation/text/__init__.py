# SPDX-License-Identifier: Apache-2.0
"""Evaluation of compressed caches on documents with questions."""
