/** From texts to token ids, as in the Python package: same truncation, same padding. */

import { Tokenizer } from "@huggingface/tokenizers";

import { CascadeError } from "./errors.js";

/** A text, or a pair of texts for a task on pairs. */
export type Text = string | readonly [string, string];

/** The token ids of one text, without padding. */
export interface Encoded {
  ids: number[];
  typeIds: number[];
  truncated: boolean;
}

/** The inputs of a model, row by row, each of shape (rows, tokens). */
export interface Batch {
  shape: [number, number];
  input_ids: BigInt64Array;
  attention_mask: BigInt64Array;
  token_type_ids: BigInt64Array;
}

interface Normalizer {
  type?: string;
  handle_chinese_chars?: boolean;
  normalizers?: Normalizer[];
}

interface TokenizerFile {
  model?: { type?: string };
  post_processor?: { type?: string } | null;
  normalizer?: Normalizer | null;
  padding?: { direction?: string; pad_id?: number; pad_type_id?: number } | null;
  truncation?: { direction?: string } | null;
}

const STAND_IN = "a"; // for an empty second text, which the library would take for none
// Each is a word of its own for BERT's normalizer; the library knows only those of the basic plane.
const RARE_IDEOGRAPHS = /[\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu;
const LONGEST = 2 ** 20; // characters; the Python package tokenizes only the beginning of longer texts

export class TextTokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #padding: { id: bigint; typeId: bigint; left: boolean };
  readonly #cutsLeft: boolean;
  readonly #parts: boolean;

  /** Read a tokenizer.json; throw CascadeError for one that is not a BERT's. `maxLength`: with special tokens. */
  static parse(bytes: Uint8Array, maxLength: number, pair: boolean): TextTokenizer {
    let file: TokenizerFile;
    try {
      file = JSON.parse(new TextDecoder().decode(bytes)) as TokenizerFile;
    } catch (error) {
      throw new CascadeError("tokenizer: not JSON; expected the bundle's tokenizer.json", { cause: error });
    }
    const [model, special] = [file.model?.type, file.post_processor?.type];
    if (model !== "WordPiece" || (special !== "BertProcessing" && special !== "TemplateProcessing")) {
      throw new CascadeError(`tokenizer: found ${model} with ${special}, expected WordPiece, as BERT has`);
    }
    return new TextTokenizer(file, maxLength, pair);
  }

  /** `file`: the parsed tokenizer.json of a BERT. `maxLength`: in tokens, special ones included. */
  constructor(
    file: object,
    readonly maxLength: number,
    readonly pair: boolean,
  ) {
    const { padding, truncation } = file as TokenizerFile;
    this.#padding = {
      id: BigInt(padding?.pad_id ?? 0),
      typeId: BigInt(padding?.pad_type_id ?? 0),
      left: padding?.direction?.toLowerCase() === "left",
    };
    this.#cutsLeft = truncation?.direction?.toLowerCase() === "left";
    this.#parts = normalizers(file).some(({ type, handle_chinese_chars: parts }) => type === "BertNormalizer" && parts);
    this.#tokenizer = new Tokenizer(file, {});
  }

  /** Return the token ids of a text; `index` is named in errors. */
  encode(text: Text, index: number): Encoded {
    const [first, second] = this.#checked(text, index);
    const { ids, typeIds } = this.#withSpecial(first, second);
    const excess = ids.length - this.maxLength;
    if (excess <= 0) return { ids, typeIds, truncated: false };
    const sides = [first, ...(second === null ? [] : [second])].map((side) => this.#withoutSpecial(side));
    const kept = this.#kept(ids, sides, excess);
    return { ids: kept.map((at) => ids[at]!), typeIds: kept.map((at) => typeIds[at]!), truncated: true };
  }

  /** Pad some texts to the longest of them. */
  batch(texts: readonly Encoded[]): Batch {
    const tokens = Math.max(1, ...texts.map((text) => text.ids.length));
    const size = texts.length * tokens;
    const { id, typeId, left } = this.#padding;
    const batch: Batch = {
      shape: [texts.length, tokens],
      input_ids: new BigInt64Array(size).fill(id),
      attention_mask: new BigInt64Array(size),
      token_type_ids: new BigInt64Array(size).fill(typeId),
    };
    texts.forEach((text, row) => {
      const start = row * tokens + (left ? tokens - text.ids.length : 0);
      text.ids.forEach((token, at) => {
        batch.input_ids[start + at] = BigInt(token);
        batch.token_type_ids[start + at] = BigInt(text.typeIds[at]!);
      });
      batch.attention_mask.fill(1n, start, start + text.ids.length);
      if (!text.ids.length) batch.attention_mask[row * tokens + (left ? tokens - 1 : 0)] = 1n;
    });
    return batch;
  }

  #withSpecial(first: string, second: string | null): Omit<Encoded, "truncated"> {
    const options = { text_pair: second === "" ? STAND_IN : second, return_token_type_ids: true } as const;
    const { ids, token_type_ids: typeIds } = this.#tokenizer.encode(first, options);
    if (second !== "") return { ids, typeIds };
    const [side, standIn] = [first, STAND_IN].map((text) => this.#withoutSpecial(text)) as [number[], number[]];
    const start = find(ids, standIn, find(ids, side, 0) + side.length);
    const outside = (_: number, at: number) => at < start || at >= start + standIn.length;
    return { ids: ids.filter(outside), typeIds: typeIds.filter(outside) };
  }

  #withoutSpecial(text: string): number[] {
    return this.#tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** Return which positions remain when the sides are cut, the longer one first; special tokens remain. */
  #kept(ids: number[], sides: number[][], excess: number): number[] {
    const room = roomFor(sides[0]!.length, sides[1]?.length ?? 0, excess);
    const cut = new Set<number>();
    let after = 0;
    sides.forEach((side, which) => {
      const start = find(ids, side, after);
      after = start + side.length;
      const [from, to] = this.#cutsLeft ? [start, after - room[which]!] : [start + room[which]!, after];
      for (let at = from; at < to; at++) cut.add(at);
    });
    return ids.map((_, at) => at).filter((at) => !cut.has(at));
  }

  #checked(text: Text, index: number): [string, string | null] {
    const isPair = Array.isArray(text) && text.length === 2 && text.every((side) => typeof side === "string");
    if (this.pair ? !isPair : typeof text !== "string") {
      const expected = this.pair ? "a pair of texts" : "a text";
      throw new CascadeError(`text ${index}: found ${kindOf(text)}, expected ${expected}`);
    }
    const sides = (isPair ? text : [text]) as string[];
    for (const side of sides) {
      const characters = side.length > LONGEST ? [...side].length : 0;
      if (characters > LONGEST) {
        throw new CascadeError(`text ${index}: found ${characters} characters, expected at most ${LONGEST}; shorten it`);
      }
      if (/\p{Surrogate}/u.test(side)) {
        throw new CascadeError(`text ${index}: found half a surrogate pair, expected Unicode text; replace it`);
      }
    }
    const [first, second] = sides.map((side) => (this.#parts ? side.replace(RARE_IDEOGRAPHS, " $& ") : side));
    return [first!, second ?? null];
  }
}

/** Return the normalizer of a tokenizer.json, and those that it consists of. */
function normalizers(file: TokenizerFile): Normalizer[] {
  const whole = file.normalizer;
  return whole ? [whole, ...(whole.normalizers ?? [])] : [];
}

/** Return how many tokens of each side remain when `excess` are cut, from the longer side first, then evenly. */
function roomFor(first: number, second: number, excess: number): [number, number] {
  const total = Math.max(0, first + second - excess);
  if (second === 0) return [total, 0];
  let shorter = Math.min(first, second);
  let longer = total - shorter;
  if (shorter > longer) {
    shorter = Math.floor(total / 2);
    longer = total - shorter;
  }
  return first <= second ? [shorter, longer] : [longer, shorter];
}

/** Return where `part` begins in `ids`, at or after `from`: few special tokens stand before it. */
function find(ids: number[], part: number[], from: number): number {
  for (let start = from; start + part.length <= ids.length; start++) {
    if (part.every((id, at) => ids[start + at] === id)) return start;
  }
  throw new CascadeError("this tokenizer changes a text's tokens where it adds special ones; shorten the text");
}

function kindOf(value: unknown): string {
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (value === null || value === undefined) return String(value);
  return typeof value === "string" ? "a single text" : `a value of type ${typeof value}`;
}
