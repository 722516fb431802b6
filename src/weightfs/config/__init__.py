"""Validated settings: what may stand in the configuration file, in `WEIGHTFS_…` variables and as options.

Rules: one name per setting, in kebab case everywhere (`read-timeout`, `--read-timeout`, and
`WEIGHTFS_READ_TIMEOUT`). An option beats a variable, a variable beats the file, the file beats the default; a
list given higher up replaces the one below. What is unknown or out of bounds is refused with the place where it
stands, before anything else happens.
"""

from weightfs.config.load import find_file, load, parse_headers, read_file
from weightfs.config.model import Config, HeaderRule, MirrorRule

__all__ = ["Config", "HeaderRule", "MirrorRule", "find_file", "load", "parse_headers", "read_file"]
