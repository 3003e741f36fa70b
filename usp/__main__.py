"""``python -m usp`` is the ``usp`` command."""

import sys

from usp.cli import main

sys.exit(main())
