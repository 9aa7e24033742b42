"""The command line, `pia-ray`."""
