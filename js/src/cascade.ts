/**
 * A cascade in one ONNX file.
 *
 * texts -> token ids (once) -> batches by length -> one session, which decides about exits -> predictions in the order
 * of the texts.
 */

import type { InferenceSession, Tensor, TypedTensor } from "onnxruntime-common";

import { CascadeError } from "./errors.js";
import { readFacts, type Facts } from "./metadata.js";
import { TextTokenizer, type Encoded, type Text } from "./tokenization.js";

/** The part of `onnxruntime-web` or `onnxruntime-node` that is used: `import * as ort from ...`. */
export interface OnnxRuntime {
  InferenceSession: {
    create(model: Uint8Array, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  Tensor: typeof Tensor;
}

/** The bytes of a file, or the address to fetch it from. */
export type Source = Uint8Array | ArrayBuffer | URL | string;

export interface LoadOptions {
  /** The file that `cascade-rt pack` has written. */
  model: Source;
  /** The bundle's tokenizer.json. */
  tokenizer: Source;
  /** `onnxruntime-web` or `onnxruntime-node`. */
  ort: OnnxRuntime;
  /** Passed to ONNX Runtime. */
  sessionOptions?: InferenceSession.SessionOptions;
  /** Called while the model is fetched, with bytes so far and in all (undefined where the server does not say). */
  onProgress?: (received: number, total: number | undefined) => void;
}

export interface ClassifyOptions {
  /** One threshold for each member but the last, or one for all; default: the bundle's. */
  thresholds?: number | readonly number[];
}

export interface Member {
  name: string;
  layers: number;
}

export interface Prediction {
  label: string;
  /** Probability of the label. */
  score: number;
  /** Of all labels, in the order of `Cascade.labels`. */
  probabilities: number[];
  /** Index of the member that answered. */
  exit: number;
  /** Layers of all members that ran (paper, Section 3.2). */
  layers: number;
  /** Whether tokens were cut off at the maximum length. */
  truncated: boolean;
}

const TOKEN_BUDGET = 512; // padded tokens per batch, as on CPUs in the Python package

/** A cascade, ready to classify. */
export class Cascade {
  readonly #session: InferenceSession;
  readonly #ort: OnnxRuntime;
  readonly #tokenizer: TextTokenizer;
  readonly #facts: Facts;
  #last: Promise<unknown> = Promise.resolve();

  private constructor(session: InferenceSession, ort: OnnxRuntime, tokenizer: TextTokenizer, facts: Facts) {
    this.#session = session;
    this.#ort = ort;
    this.#tokenizer = tokenizer;
    this.#facts = facts;
  }

  /** Fetch what is not given as bytes, and make the session; throw CascadeError for files that cannot be used. */
  static async load({ model, tokenizer, ort, sessionOptions, onProgress }: LoadOptions): Promise<Cascade> {
    const [modelBytes, tokenizerBytes] = await Promise.all([bytesOf(model, "model", onProgress), bytesOf(tokenizer, "tokenizer")]);
    const facts = readFacts(modelBytes);
    await checkHash(tokenizerBytes, facts.tokenizer_sha256);
    let file: object;
    try {
      file = JSON.parse(new TextDecoder().decode(tokenizerBytes)) as object;
    } catch (error) {
      throw new CascadeError("tokenizer: not JSON; expected the bundle's tokenizer.json", { cause: error });
    }
    const session = await ort.InferenceSession.create(modelBytes, sessionOptions);
    return new Cascade(session, ort, new TextTokenizer(file, facts.max_length, facts.pair), facts);
  }

  /** Names of the classes. */
  get labels(): readonly string[] {
    return this.#facts.labels;
  }

  /** The members, small to big. */
  get members(): readonly Member[] {
    return this.#facts.members;
  }

  /** The bundle's threshold of each member but the last. */
  get thresholds(): readonly number[] {
    return this.#facts.thresholds;
  }

  /** Classify texts, or pairs of texts; answers are in their order. Throws CascadeError for anything else. */
  async classify(texts: readonly Text[], { thresholds }: ClassifyOptions = {}): Promise<Prediction[]> {
    if (!Array.isArray(texts)) throw new CascadeError(`texts: found ${typeof texts}, expected an array of texts`);
    const taus = this.#taus(thresholds);
    const encoded = texts.map((text: Text, index) => this.#tokenizer.encode(text, index));
    const predictions = new Array<Prediction>(encoded.length);
    for (const rows of batches(encoded)) {
      const answers = await this.#inTurn(() => this.#run(rows.map((row) => encoded[row]!), taus));
      rows.forEach((row, at) => (predictions[row] = answers[at]!));
    }
    return predictions;
  }

  /** Free the session, after the calls before. */
  async release(): Promise<void> {
    await this.#inTurn(() => this.#session.release());
  }

  async #run(texts: Encoded[], taus: Float64Array): Promise<Prediction[]> {
    const { shape, ...inputs } = this.#tokenizer.batch(texts);
    const feeds: Record<string, Tensor> = { thresholds: new this.#ort.Tensor("float64", taus, [taus.length]) };
    for (const [name, values] of Object.entries(inputs)) feeds[name] = new this.#ort.Tensor("int64", values, shape);
    const found = await this.#session.run(feeds);
    const probabilities = (found["probabilities"] as TypedTensor<"float32">).data;
    const exits = (found["exit"] as TypedTensor<"int64">).data;
    const layers = (found["layers"] as TypedTensor<"int64">).data;
    const count = this.labels.length;
    return texts.map((text, row) => {
      const own = Array.from(probabilities.subarray(row * count, (row + 1) * count));
      if (!own.every(Number.isFinite)) throw new CascadeError("model: answered NaN or infinity; export it again");
      const score = Math.max(...own);
      return {
        label: this.labels[own.indexOf(score)]!,
        score,
        probabilities: own,
        exit: Number(exits[row]),
        layers: Number(layers[row]),
        truncated: text.truncated,
      };
    });
  }

  /** Run one task at a time: a session in a browser cannot run two. */
  #inTurn<Result>(task: () => Promise<Result>): Promise<Result> {
    const result = this.#last.then(task);
    this.#last = result.catch(() => undefined);
    return result;
  }

  #taus(given: number | readonly number[] | undefined): Float64Array {
    const count = this.members.length - 1;
    const taus = typeof given === "number" ? new Array<number>(count).fill(given) : (given ?? this.thresholds);
    if (!Array.isArray(taus) || taus.length !== count || !taus.every((tau) => typeof tau === "number" && tau >= 0 && tau <= 1)) {
      throw new CascadeError(
        `thresholds: found ${JSON.stringify(given)}, expected a number from 0 to 1, or ${count}: one per member but the last`,
      );
    }
    return Float64Array.from(taus as number[]);
  }
}

/** Cut texts, in order of length, into batches of at most `TOKEN_BUDGET` padded tokens, at least one text each. */
function* batches(texts: readonly Encoded[]): Generator<number[]> {
  const rows = texts.map((_, row) => row).sort((one, other) => texts[other]!.ids.length - texts[one]!.ids.length);
  for (let start = 0; start < rows.length; ) {
    const longest = Math.max(1, texts[rows[start]!]!.ids.length);
    const end = start + Math.max(1, Math.floor(TOKEN_BUDGET / longest));
    yield rows.slice(start, end);
    start = end;
  }
}

async function bytesOf(source: Source, what: string, onProgress?: LoadOptions["onProgress"]): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  let response: Response;
  try {
    response = await fetch(source);
  } catch (error) {
    throw new CascadeError(`${what}: cannot fetch ${source} (${(error as Error).message})`, { cause: error });
  }
  if (!response.ok) throw new CascadeError(`${what}: ${source} answered ${response.status}, expected the file`);
  if (!onProgress || !response.body) return new Uint8Array(await response.arrayBuffer());
  const total = Number(response.headers.get("content-length")) || undefined;
  const parts: Uint8Array[] = [];
  let received = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    received += part.value.length;
    onProgress(received, total);
  }
  const whole = new Uint8Array(received);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Compare the tokenizer's hash where the browser can compute one: on https and localhost. */
async function checkHash(bytes: Uint8Array, expected: string): Promise<void> {
  if (!globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected) {
    throw new CascadeError("tokenizer: not the one that the model was packed with; take tokenizer.json of the same bundle");
  }
}
