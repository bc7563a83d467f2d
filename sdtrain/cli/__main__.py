"""`python -m sdtrain.cli`, for launchers of several processes."""

from sdtrain.cli import main

main()
