"""What the journey of a text is made of: tokenization, micro-batches, stages (ONNX sessions), exit rules, and costs."""
