# SPDX-License-Identifier: Apache-2.0
"""Measuring once, offline, which attention heads of a model retrieve and reason: the head tables of `headkv-r2`."""

from __future__ import annotations

from headkv_mm.calibration.procedure import Calibration, calibrate
from headkv_mm.calibration.prompts import NeedlePrompt, needle_prompt

__all__ = ["Calibration", "NeedlePrompt", "calibrate", "needle_prompt"]
