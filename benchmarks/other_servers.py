"""The servers that serving.py compares with. Run by it, each in a process of its own."""

from __future__ import annotations

import argparse
from typing import Any


def apart(options: argparse.Namespace) -> None:
    """Serve our server, but texts of different requests never run together."""
    from cascade_rt.serving.batcher import Batcher
    from cascade_rt.serving.server import Setup, listen, serve
    from cascade_rt.serving.service import Service
    from cascade_rt.serving.settings import Settings

    take = Batcher._take

    def take_one(batcher: Batcher, stage: int) -> Any:
        texts = take(batcher, stage)
        others = [text for text in texts if text.ticket is not texts[0].ticket]
        batcher._queues[stage] = sorted([*others, *batcher._queues[stage]], key=lambda text: text.arrived)
        return [text for text in texts if text.ticket is texts[0].ticket]

    Batcher._take = take_one  # type: ignore[assignment, method-assign]
    settings = Settings(max_queue=options.max_queue)
    setup = Setup({"default": options.model_dir}, settings, "127.0.0.1", options.port, grace=1)
    serve(Service(setup.sources, settings), listen(setup.host, setup.port), setup)


def fastapi(options: argparse.Namespace) -> None:
    """Serve a pipeline of Optimum with FastAPI, whose thread pool calls it for one request at a time."""
    import uvicorn
    from fastapi import FastAPI

    app, classify = FastAPI(), optimum_pipeline(options.member)

    @app.post("/predict")
    def predict(body: dict[str, str]) -> Any:
        return classify(body["inputs"])

    uvicorn.run(app, port=options.port, log_level="error", access_log=False)


def plain(options: argparse.Namespace) -> None:
    """Serve a bundle's first member alone with uvicorn, one route, the tokenizers library and a session: a bound."""
    import json
    from pathlib import Path

    import numpy as np
    import onnxruntime
    import uvicorn
    from tokenizers import Tokenizer

    from cascade_rt import read_bundle

    bundle = read_bundle(options.model_dir)
    folder, member = bundle.folder or Path(), bundle.members[0]
    tokenizer = Tokenizer.from_file(str(folder / bundle.tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(bundle.max_length)
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / member.file), threads, providers=["CPUExecutionProvider"])

    def answer(body: bytes) -> bytes:
        ids = np.array([tokenizer.encode(json.loads(body)["inputs"]).ids])
        logits = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
        odds = np.exp(logits - logits.max())
        scores = (odds / odds.sum()).tolist()
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return json.dumps([{"label": bundle.labels[at], "score": scores[at]} for at in order]).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        answered = answer(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answered)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answered})

    uvicorn.run(app, port=options.port, log_level="error", lifespan="off", timeout_keep_alive=600)


def optimum_pipeline(member: str) -> Any:
    """Return a text-classification pipeline on ONNX Runtime."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    model = ORTModelForSequenceClassification.from_pretrained(member, export=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(member, trust_remote_code=False)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    servers = {"apart": apart, "fastapi": fastapi, "plain": plain}
    parser.add_argument("server", choices=servers)
    parser.add_argument("--model-dir")
    parser.add_argument("--member")
    parser.add_argument("--max-queue", type=int, default=1000)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    servers[options.server](options)


if __name__ == "__main__":
    main()
