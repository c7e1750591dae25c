/** The metadata of an ONNX file, which ONNX Runtime does not show in JavaScript. */

import { CascadeError } from "./errors.js";

/** What `cascade-rt pack` writes about a cascade. */
export interface Facts {
  labels: string[];
  members: { name: string; layers: number }[];
  thresholds: number[];
  max_length: number;
  pair: boolean;
  tokenizer_sha256: string;
  /** Absent for one label per text. */
  task?: string;
}

const TASKS = ["single_label", "multi_label"];

const METADATA_PROPS = 14; // of ModelProto, in onnx.proto; an entry's key is field 1, its value field 2
const BYTES = 2; // the wire type of strings and messages
const REMEDY = "expected an ONNX file that cascade-rt pack has written";

/** Return the facts in the bytes of a model; throw CascadeError if it has none. */
export function readFacts(model: Uint8Array): Facts {
  try {
    for (const { field, bytes } of fields(model)) {
      if (field !== METADATA_PROPS) continue;
      const [key, value] = [...fields(bytes)].map((part) => new TextDecoder().decode(part.bytes));
      if (key === "cascade" && value !== undefined) return known(JSON.parse(value) as Facts);
    }
  } catch (error) {
    if (error instanceof CascadeError) throw error;
    throw new CascadeError(`model: not a readable ONNX file; ${REMEDY}`, { cause: error });
  }
  throw new CascadeError(`model: found no cascade in its metadata; ${REMEDY}`);
}

/** Return the facts; throw CascadeError for a task that is not known. */
function known(facts: Facts): Facts {
  if (!TASKS.includes(facts.task ?? "single_label")) {
    throw new CascadeError(`model: found the task ${facts.task}, this package knows ${TASKS.join(", ")}; install a newer one`);
  }
  return facts;
}

/** Yield the strings and messages of a protocol buffer, without reading what is in them. */
function* fields(buffer: Uint8Array): Generator<{ field: number; bytes: Uint8Array }> {
  let at = 0;

  function varint(): number {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = buffer[at++];
      if (byte === undefined) throw new RangeError("the file ends within a number");
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  }

  while (at < buffer.length) {
    const tag = varint();
    const type = tag % 8;
    if (type === BYTES) {
      const length = varint();
      if (at + length > buffer.length) throw new RangeError("the file ends within a field");
      yield { field: (tag - type) / 8, bytes: buffer.subarray(at, at + length) };
      at += length;
    } else if (type === 0) varint();
    else if (type === 1) at += 8;
    else if (type === 5) at += 4;
    else throw new RangeError(`found wire type ${type}`);
  }
}
