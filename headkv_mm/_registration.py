# SPDX-License-Identifier: Apache-2.0
"""Registers headkv_mm with transformers, each part when transformers has loaded what it registers with.

transformers loads its modules when they are first used, and ``import headkv_mm`` must not load them earlier: that
would double the time of the import. So each registration waits for its module, and runs at once if that is there.

It goes in two steps: the module of transformers makes us import ours, and ours, once it is complete, registers. In one
step it would fail where our module is imported first and itself brings in transformers' module: it is half made then.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from wrapt import register_post_import_hook


class RegistrationError(ImportError):
    """A part of headkv_mm could not be imported or registered when transformers loaded its counterpart."""


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

    def load(self, _: ModuleType) -> None:
        """Imports our module; called when transformers has imported its own.

        Raises:
            RegistrationError: our module cannot be imported, or it cannot register.
        """
        try:
            importlib.import_module(self.module)
        except RegistrationError:
            raise
        except Exception as error:
            raise RegistrationError(
                f"headkv_mm could not register itself with {self.after}: importing {self.module} raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def run(self, ours: ModuleType) -> None:
        """Registers; called when our module is complete.

        Raises:
            RegistrationError: it cannot register.
        """
        try:
            getattr(ours, self.function)()
        except Exception as error:
            raise RegistrationError(
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
        register_post_import_hook(registration.run, registration.module)
        register_post_import_hook(registration.load, registration.after)
