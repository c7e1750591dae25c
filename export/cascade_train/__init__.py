"""The offline stage that makes members: tasks and their data, fine-tuning (extra: cascade-rt[export])."""

RECORD = "cascade_train.json"
"""In a member's folder: what training did."""

VALIDATION = "validation.jsonl"
"""In a member's folder: the examples held out of its training."""
