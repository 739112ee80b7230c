# SPDX-License-Identifier: Apache-2.0
"""Selectors: who leaves, given scores and budgets."""

from .mass_segments import MassSegments
from .stratified import Stratified

__all__ = ["MassSegments", "Stratified"]
