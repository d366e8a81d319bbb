"""``python -m msd_compiler``."""

from .cli import main

main()
