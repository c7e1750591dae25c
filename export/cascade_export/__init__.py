"""The offline stage that makes bundles: checkpoint -> ONNX -> fuse -> precision -> check -> bundle (extra: export)."""

import cascade_rt  # noqa: F401 - turns the telemetry of ONNX Runtime off before anything here imports it
