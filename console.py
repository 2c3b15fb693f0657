"""The console command of an installed package: `vit-distillation FLAGS` runs main.py.

The modules import one another by their top-level names. The package's folder is put on
`sys.path` in this process only, so that `import datasets` elsewhere still finds the package of
that name.
"""

import sys
from pathlib import Path


def main() -> int:
    """Run main.py with the arguments of the command line and return its exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import base.quiet_start  # noqa: F401  before the modules that take long
    from main import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
