# SPDX-License-Identifier: Apache-2.0
"""Published LlamaGen checkpoints as transformers folders."""

from __future__ import annotations

from headkv_mm.llamagen.convert.folder import Conversion, convert_llamagen

__all__ = ["Conversion", "convert_llamagen"]
