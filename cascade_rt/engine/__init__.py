"""The parts of a text's journey: tokenization, micro-batches, stages (ONNX sessions), exit rules, and costs."""
