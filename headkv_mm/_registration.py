# SPDX-License-Identifier: Apache-2.0
"""Registers headkv_mm with transformers, each part when transformers has loaded what it registers with.

transformers loads its modules when they are first used, and ``import headkv_mm`` must not load them earlier: that
would double the time of the import. So each registration waits for its module, and runs at once if that is there.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from wrapt import register_post_import_hook


class Registration(NamedTuple):
    """What runs after which module of transformers.

    Attributes:
        after: the module of transformers to wait for.
        module: our module with the function; it is imported then, not before.
        function: the function's name; it takes no argument and may run more than once.
    """

    after: str
    module: str
    function: str

    def __call__(self, loaded: ModuleType) -> None:
        """Runs the registration. ``loaded`` is the module that transformers has just imported.

        Raises:
            ImportError: our module cannot be imported, or it cannot register.
        """
        try:
            getattr(importlib.import_module(self.module), self.function)()
        except Exception as error:
            raise ImportError(
                f"headkv_mm could not register itself with {self.after}: {self.module}.{self.function}() raised "
                f"{type(error).__name__}: {error}"
            ) from error


REGISTRATIONS = (
    Registration("transformers.modeling_utils", "headkv_mm.attention", "register"),
    Registration("transformers.pipelines", "headkv_mm.pipelines.registration", "register"),
    Registration("transformers.models.auto.configuration_auto", "headkv_mm.llamagen.registration", "register"),
)


def install() -> None:
    """Arranges every registration. Prints nothing and imports no module of transformers."""
    for registration in REGISTRATIONS:
        register_post_import_hook(registration, registration.after)
