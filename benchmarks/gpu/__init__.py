"""One command for a machine with a GPU: `make gpu`. Parts that each measure one thing and write one card."""
