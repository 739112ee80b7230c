# SPDX-License-Identifier: Apache-2.0
"""A folder of images, drawn by any number of processes that may be killed at any moment.

`prompts` reads the list, `jobs` turns it into images and fixed batches, `folder` keeps what is finished, `share` is
what one process does, and `run` puts them together with accelerate's processes. Nothing here knows a model: drawing is
a function that is passed in.
"""
