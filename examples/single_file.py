"""Classify without cascade_rt: python single_file.py CASCADE.onnx TOKENIZER.json TEXT..."""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession(sys.argv[1])
cascade = json.loads(session.get_modelmeta().custom_metadata_map["cascade"])
tokenizer = Tokenizer.from_file(sys.argv[2])
tokenizer.enable_truncation(cascade["max_length"])
encodings = tokenizer.encode_batch(sys.argv[3:])
fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {name: np.array([getattr(text, field) for text in encodings]) for name, field in fields.items()}
probabilities, exits, *_ = session.run(None, inputs | {"thresholds": np.array(cascade["thresholds"])})
for text, row, exit in zip(sys.argv[3:], probabilities, exits, strict=True):
    print(f"{text}\t{cascade['labels'][row.argmax()]}\t{row.max():.3f}\t{cascade['members'][exit]['name']}")
