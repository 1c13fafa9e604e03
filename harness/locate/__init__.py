"""Where a candidate that is not the same model goes wrong: what its weights, tables and modules say.

``harness.locate`` is this package and the public function of the same name: once a part of the package has been
imported, Python binds the name to the package, so the package can be called.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """The package; called, it is `harness.flow.locate`."""

    def __call__(self, *given: Any, **keywords: Any) -> Any:
        from harness.flow.locating import locate

        return locate(*given, **keywords)


sys.modules[__name__].__class__ = _Callable
