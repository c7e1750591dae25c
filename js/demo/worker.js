// Loads the cascade and classifies, away from the page's thread.

import { Cascade } from "cascade-rt";
import * as ort from "onnxruntime-web/wasm";

const runtime = (kind) => new URL(`ort-wasm-simd-threaded.${kind}`, self.location).href;
ort.env.wasm.wasmPaths = { mjs: runtime("mjs"), wasm: runtime("wasm") };
ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1; // threads need shared memory

const loading = Cascade.load({
  model: new URL("cascade.onnx", self.location),
  tokenizer: new URL("tokenizer.json", self.location),
  ort,
  onProgress: (received, total) => postMessage({ received, total }),
}).then((cascade) => {
  const { members, thresholds, labels } = cascade;
  postMessage({ members, thresholds, labels, threads: ort.env.wasm.numThreads });
  return cascade;
});
loading.catch((error) => postMessage({ error: error.message }));

self.onmessage = async ({ data: { texts, thresholds } }) => {
  try {
    const cascade = await loading;
    const started = performance.now();
    const predictions = await cascade.classify(texts, { thresholds });
    postMessage({ predictions, milliseconds: performance.now() - started });
  } catch (error) {
    postMessage({ error: error.message });
  }
};
