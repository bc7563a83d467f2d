"""`python -m sdtrain.cli`, for multi-process launchers."""

from sdtrain.cli import main

main()
