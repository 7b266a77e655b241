"""`python -m pipelines.cli`: the `scop` command."""

import sys

from pipelines.cli.main import main

sys.exit(main())
