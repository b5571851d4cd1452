"""`python -m afa` is `afa`."""

import sys

from afa.cli.main import main

sys.exit(main())
