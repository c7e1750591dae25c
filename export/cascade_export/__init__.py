"""The offline stage that makes bundles: checkpoint -> ONNX -> fuse -> verify -> bundle (extra: cascade-rt[export])."""
