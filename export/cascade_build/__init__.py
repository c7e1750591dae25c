"""From labelled texts to a bundle in one resumable command: split, train, export, tune, report (extra: build)."""

import cascade_rt  # noqa: F401 - turns the telemetry of ONNX Runtime off before anything here imports it
