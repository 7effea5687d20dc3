"""Times a kernel's backends against each other on the device that is here: `python -m`."""
