"""``python -m appa_lite COMMAND key=value ...``, for ``accelerate launch -m appa_lite``."""

import sys

from appa_lite.cli import main

sys.exit(main())
