"""``python -m m2dexport``: the command line."""

from m2dexport.cli import main

main()
