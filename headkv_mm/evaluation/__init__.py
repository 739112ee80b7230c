# SPDX-License-Identifier: Apache-2.0
"""Measures what compression costs in quality and saves in bytes, on the embedded image model's own test."""
