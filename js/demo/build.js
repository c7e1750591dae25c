// Builds the demo page into demo/dist, with a model: node demo/build.js CASCADE.onnx TOKENIZER.json

import { build } from "esbuild";
import { copyFile, mkdir, rm } from "node:fs/promises";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const target = `${here}dist/`;
const [model, tokenizer] = process.argv.slice(2);
if (!tokenizer) {
  console.error("expected two files: node demo/build.js CASCADE.onnx TOKENIZER.json");
  process.exit(2);
}

await rm(target, { recursive: true, force: true });
await mkdir(target);
await build({
  entryPoints: [`${here}worker.js`, `${here}page.js`],
  outdir: target,
  bundle: true,
  format: "esm",
  minify: true,
  conditions: ["onnxruntime-web-use-extern-wasm"], // its threads load that file again, which must not be our bundle
  alias: { "cascade-rt": `${here}../dist/index.js` },
  logLevel: "warning",
});
const runtime = fileURLToPath(new URL("../node_modules/onnxruntime-web/dist/", import.meta.url));
const copies = { [`${here}index.html`]: "index.html", [model]: "cascade.onnx", [tokenizer]: "tokenizer.json" };
for (const name of ["mjs", "wasm"].map((kind) => `ort-wasm-simd-threaded.${kind}`)) copies[runtime + name] = name;
for (const [source, name] of Object.entries(copies)) await copyFile(source, target + name);
console.log(`${target}: serve it with any web server, for instance python -m http.server -d demo/dist`);
