# SPDX-License-Identifier: Apache-2.0
"""Draw a list of prompts into a folder, on several processes; the same as `headkv-mm generate --prompts`.

    accelerate launch --num_processes 4 scripts/generate_images.py prompts.jsonl --output images --kv-budget 1/6

After an interruption the same command goes on where it was, on any number of processes. See docs/multi_gpu.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from headkv_mm import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run `headkv-mm generate --prompts` with these arguments; the first one may be the list itself."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and (given[0] == "-" or not given[0].startswith("-")):
        given.insert(0, "--prompts")
    return cli.main(["generate", *given])


if __name__ == "__main__":
    sys.exit(main())
