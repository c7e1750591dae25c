"""The offline stage that makes members: tasks, fine-tuning, difficulty, losses, analysis (extra: export)."""

RECORD = "cascade_train.json"
"""In a member's folder: the training record."""

VALIDATION = "validation.jsonl"
"""In a member's folder: the examples held out of its training."""
