"""Statistics that calibrated methods will ask for: a file each, found by listing. There are none yet."""
