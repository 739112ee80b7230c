# SPDX-License-Identifier: Apache-2.0
"""Which number that is known when a method must decide tells how many entries a head will need?"""
