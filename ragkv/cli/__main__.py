"""``python -m ragkv.cli``: the command where no script is on the path."""

import sys

from ragkv.cli import main

sys.exit(main())
