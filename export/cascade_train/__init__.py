"""The offline stage that makes members: tasks and their data, fine-tuning (extra: cascade-rt[export])."""
