# SPDX-License-Identifier: Apache-2.0
"""Runs every check in Triton's interpreter and prints one JSON object: check and dtype -> null or the error.

Started with `python -m` from the root. A process of its own, because the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, about values under a mask

import torch  # noqa: E402

from headkv_mm.kernels import gpu  # noqa: E402

from .triton_checks import CHECKS, DTYPE_FREE  # noqa: E402

torch.set_num_threads(1)
# The interpreter's bfloat16 arithmetic is wrong, so bfloat16 is for devices.
DTYPES = {"float32": torch.float32, "float16": torch.float16}

results: dict[str, str | None] = {}
for check, function in CHECKS.items():
    for name, dtype in DTYPES.items():
        if check in DTYPE_FREE and dtype != torch.float32:
            continue
        begin = time.process_time()
        try:
            function(gpu, "cpu", dtype)
            results[f"{check}-{name}"] = None
        except Exception:
            results[f"{check}-{name}"] = traceback.format_exc(limit=-6)
        print(f"{check}-{name}: {time.process_time() - begin:.1f} s", file=sys.stderr)
print(json.dumps(results))
