"""Calls written to a TOML file by the runs that make them, to be compiled ahead of other runs."""
