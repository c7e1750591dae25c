"""`python -m cascade_rt` is `cascade-rt`."""

from .cli import main

raise SystemExit(main())
