/** Text classification with a cascade of BERTs, from the one ONNX file that `cascade-rt pack` writes. */

export { Cascade } from "./cascade.js";
export type { ClassifyOptions, LoadOptions, Member, OnnxRuntime, Prediction, Source } from "./cascade.js";
export { CascadeError } from "./errors.js";
export type { Text } from "./tokenization.js";
