"""`python -m glmctl`: the same command line as the console script."""

import sys
from pathlib import Path

# Python puts the working directory first on the path. In a checkout its root has doors named `model` and `kernels`,
# which would be imported in place of installed packages of those names.
_DOORS = ("commands", "kernels", "model", "recipes")
sys.path[:] = [
    entry for entry in sys.path if not all((Path(entry or ".") / door / "__init__.py").is_file() for door in _DOORS)
]

from glmctl.cli import main  # noqa: E402 - only now is the path safe

if __name__ == "__main__":
    sys.exit(main())
