"""Pure rules: geometry, planning, retry, trees, formats. No I/O, no clock, no randomness of its own."""
