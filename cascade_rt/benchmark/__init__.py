"""Speed on this machine: what `cascade-rt benchmark` and the scripts under benchmarks/ share."""
