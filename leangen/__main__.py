"""`python -m leangen`: the command line."""

from leangen.cli import main

raise SystemExit(main())
