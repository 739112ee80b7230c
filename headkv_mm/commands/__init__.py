# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `headkv-mm`: one module each, with `add_arguments(parser)` and `run(args) -> exit status`."""
