"""The parts of a text's journey: tokenization, micro-batches, stages and backends, tasks, exit rules, and costs."""
