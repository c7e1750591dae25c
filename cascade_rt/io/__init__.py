"""Records in, records out: `readers` for the input formats, `writers` for JSON and atomic output files."""
