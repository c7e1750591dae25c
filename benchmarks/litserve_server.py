"""LitServe with dynamic batching around a pipeline of Optimum. Run by serving.py; LitServe pickles it to its worker."""

from __future__ import annotations

import argparse
from typing import Any

import litserve
from other_servers import optimum_pipeline

BATCH, WAIT = 32, 0.005  # texts and seconds


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """Answers batches of requests."""

    def __init__(self, member: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT, api_path="/predict")
        self.member = member

    def setup(self, device: str) -> None:
        """Make the pipeline, in the worker."""
        self.classify = optimum_pipeline(self.member)

    def decode_request(self, request: dict[str, str]) -> str:
        """Return the text of a request."""
        return request["inputs"]

    def predict(self, x: list[str]) -> Any:
        """Classify a batch."""
        return self.classify(x, batch_size=len(x))

    def encode_response(self, output: Any) -> Any:
        """Return the answer as it is."""
        return output


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--member", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    server = litserve.LitServer(Classifier(options.member), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=options.port, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
