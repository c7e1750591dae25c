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
  /** The label alone; with several labels per text all that are above their cut, possibly none. */
  labels: string[];
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
  #released = false;

  private constructor(session: InferenceSession, ort: OnnxRuntime, tokenizer: TextTokenizer, facts: Facts) {
    this.#session = session;
    this.#ort = ort;
    this.#tokenizer = tokenizer;
    this.#facts = facts;
  }

  /** Fetch what is not given as bytes, and make the session; throw CascadeError for files that cannot be used. */
  static async load({ model, tokenizer, ort, sessionOptions, onProgress }: LoadOptions): Promise<Cascade> {
    if (!ort?.InferenceSession) {
      throw new CascadeError("ort: found none, expected the module onnxruntime-node or onnxruntime-web, as it is imported");
    }
    const abort = new AbortController();
    try {
      const [modelBytes, tokenizerBytes] = await Promise.all([
        bytesOf(model, "model", abort.signal, onProgress),
        bytesOf(tokenizer, "tokenizer", abort.signal),
      ]);
      const facts = readFacts(modelBytes);
      await checkHash(tokenizerBytes, facts.tokenizer_sha256);
      const reader = TextTokenizer.parse(tokenizerBytes, facts.max_length, facts.pair);
      const session = await ort.InferenceSession.create(modelBytes, sessionOptions).catch((error) => {
        throw failure("model: ONNX Runtime cannot load it", error);
      });
      return new Cascade(session, ort, reader, facts);
    } catch (error) {
      abort.abort(); // the other file is not needed
      throw error;
    }
  }

  /** Names of the classes. */
  get labels(): readonly string[] {
    return this.#facts.labels;
  }

  /** "single_label" or "multi_label". */
  get task(): string {
    return this.#facts.task ?? "single_label";
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
    if (this.#released) throw new CascadeError("this cascade is released; load it again");
    const taus = this.#taus(thresholds);
    const encoded = Array.from(texts as readonly Text[], (text, index) => this.#tokenizer.encode(text, index));
    return this.#inTurn(async () => {
      const predictions = new Array<Prediction>(encoded.length);
      for (const rows of batches(encoded)) {
        const answers = await this.#run(rows.map((row) => encoded[row]!), taus);
        rows.forEach((row, at) => (predictions[row] = answers[at]!));
      }
      return predictions;
    });
  }

  /** Free the session, after the calls before. */
  async release(): Promise<void> {
    if (this.#released) return;
    this.#released = true;
    await this.#inTurn(() => this.#session.release());
  }

  async #run(texts: Encoded[], taus: Float64Array): Promise<Prediction[]> {
    const { shape, ...inputs } = this.#tokenizer.batch(texts);
    const feeds: Record<string, Tensor> = { thresholds: new this.#ort.Tensor("float64", taus, [taus.length]) };
    for (const [name, values] of Object.entries(inputs)) feeds[name] = new this.#ort.Tensor("int64", values, shape);
    const found = await this.#session.run(feeds).catch((error) => {
      throw failure(`model: failed on ${shape[0]} texts of ${shape[1]} tokens`, error);
    });
    const probabilities = (found["probabilities"] as TypedTensor<"float32">).data;
    const exits = (found["exit"] as TypedTensor<"int64">).data;
    const layers = (found["layers"] as TypedTensor<"int64">).data;
    const above = (found["labels"] as TypedTensor<"bool"> | undefined)?.data; // with several labels per text
    const count = this.labels.length;
    return texts.map((text, row) => {
      const own = Array.from(probabilities.subarray(row * count, (row + 1) * count));
      if (!own.every(Number.isFinite)) throw new CascadeError("model: answered NaN or infinity; export it again");
      const score = Math.max(...own);
      const label = this.labels[own.indexOf(score)]!;
      return {
        label,
        score,
        probabilities: own,
        exit: Number(exits[row]),
        layers: Number(layers[row]),
        labels: above ? this.labels.filter((_, at) => above[row * count + at]) : [label],
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
        `thresholds: found ${Array.isArray(given) ? JSON.stringify(given) : String(given)}, expected a number from 0 to 1, or ${count}: one per member but the last`,
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

async function bytesOf(
  source: Source,
  what: string,
  signal: AbortSignal,
  onProgress?: LoadOptions["onProgress"],
): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (String(source).startsWith("file:")) {
    throw new CascadeError(`${what}: found ${source}, expected bytes or a web address; read the file, as with readFile`);
  }
  try {
    const response = await fetch(source, { signal });
    if (!response.ok) throw new CascadeError(`${what}: ${source} answered ${response.status}, expected the file`);
    return await body(response, onProgress);
  } catch (error) {
    throw error instanceof CascadeError ? error : failure(`${what}: cannot fetch ${source}`, error);
  }
}

async function body(response: Response, onProgress?: LoadOptions["onProgress"]): Promise<Uint8Array> {
  if (!onProgress || !response.body) return new Uint8Array(await response.arrayBuffer());
  const length = response.headers.has("content-encoding") ? null : response.headers.get("content-length");
  const total = Number(length) || undefined;
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

/** Return a CascadeError with the cause's own words. */
function failure(what: string, error: unknown): CascadeError {
  const { message, cause } = error as Error;
  const reason = cause instanceof Error && cause.message ? cause.message : message;
  return new CascadeError(`${what} (${reason})`, { cause: error });
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
