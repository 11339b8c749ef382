"""From the checkpoints people own to models of this repository: `python -m conversion_scripts.NAME --help`."""
