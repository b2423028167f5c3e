"""`python -m r1v2_fast` is `r1v2-fast`."""

from r1v2_fast.cli import main

raise SystemExit(main())
