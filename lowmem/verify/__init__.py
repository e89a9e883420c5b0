"""Measures on this machine what lowmem promises of a set-up, and writes the result as a report to attach."""
