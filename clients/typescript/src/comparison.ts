/** One prompt with one seed under several steerings, and what each arm said. */

import { InvalidSteeringError, NotAppliedError, isRecord } from "./errors.js";
import { documents, type Body } from "./events.js";
import { appliedOf, rawProof, requireApplied, type Applied } from "./proof.js";
import type { ChatMessage } from "./replies.js";
import { fieldOf, mustBeApplied, type Steering } from "./spec.js";
import type { SteeringField } from "./wire.js";

/** One side of a comparison. */
export interface Arm {
  /** Nothing: the control. */
  steering?: Steering | SteeringField | null;
  /** Said before the chat, in place of steering or beside it. */
  system_prompt?: string;
}

/** By name; a `Steering` alone is an arm that is steered so, null is the control. */
export type Arms = Readonly<Record<string, Arm | Steering | null>>;

export interface CompareParams {
  model: string;
  /** This or `prompt`. */
  messages?: readonly ChatMessage[];
  prompt?: string;
  max_tokens?: number;
  temperature?: number;
  seed?: number;
  [field: string]: unknown;
}

/** What one arm said. */
export interface ArmReply {
  readonly text: string;
  readonly finish_reason: string | null;
  readonly steering: Applied;
}

/** What all arms said. */
export interface Comparison {
  /** Of every arm: the same seed gives the same draws. */
  readonly seed: number;
  /** By name, in the order that was asked for. */
  readonly arms: Readonly<Record<string, ArmReply>>;
}

/** What is new of one arm. */
export interface Piece {
  readonly arm: string;
  readonly text: string;
}

interface Side {
  readonly asked: SteeringField | null;
  readonly system_prompt: string | undefined;
  text: string;
  finish_reason: string | null;
  proof: Record<string, unknown> | null;
}

/** The arms, each with what it has said so far. */
export function sides(arms: Arms): Map<string, Side> {
  const found = new Map<string, Side>();
  for (const [name, given] of Object.entries(arms)) {
    const arm: Arm = given === null || "toJSON" in given ? { steering: given } : given;
    const { steering, system_prompt, ...unknown } = arm;
    if (Object.keys(unknown).length) {
      const message = `an arm is a Steering, null, or { steering, system_prompt }, and has no ${Object.keys(unknown).join(", ")}`;
      throw new InvalidSteeringError(`arms.${name}: ${message}`, { param: `arms.${name}` });
    }
    found.set(name, { asked: fieldOf(steering), system_prompt, text: "", finish_reason: null, proof: null });
  }
  if (found.size) return found;
  throw new InvalidSteeringError("arms: give at least one, such as { control: null }", { param: "arms" });
}

/** The JSON of a comparison. */
export function comparisonBody(arms: ReadonlyMap<string, Side>, params: CompareParams): object {
  const listed = [...arms].map(([name, { asked, system_prompt }]) => ({
    name,
    ...(asked !== null && { steering: asked }),
    ...(system_prompt !== undefined && { system_prompt }),
  }));
  return { ...params, arms: listed, stream: true };
}

/** The pieces of a comparison's arms, once, by `for await`; when it is complete, `comparison` is all of it. */
export class ComparisonStream implements AsyncIterable<Piece> {
  readonly #body: Body & { cancel(): void };
  readonly #arms: Map<string, Side>;
  #seed: number | null = null;
  #whole: Comparison | null = null;

  /** @internal */
  constructor(body: Body & { cancel(): void }, arms: Map<string, Side>) {
    this.#body = body;
    this.#arms = arms;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Piece, void, undefined> {
    for await (const document of documents(this.#body, () => this.#end())) yield this.#saw(document);
  }

  /**
   * What all arms said; known when the stream is complete.
   *
   * @throws NotAppliedError it is not.
   */
  get comparison(): Comparison {
    if (this.#whole !== null) return this.#whole;
    throw new NotAppliedError("the comparison is not complete; read it to the end, its last pieces carry the proofs");
  }

  /** Stops all arms; the server aborts them. */
  close(): void {
    this.#body.cancel();
  }

  #saw(document: Record<string, unknown>): Piece {
    const { name, seed, chunk } = document;
    const side = typeof name === "string" ? this.#arms.get(name) : undefined;
    if (side === undefined || typeof name !== "string" || typeof seed !== "number" || !isRecord(chunk)) {
      throw new NotAppliedError("a piece of the comparison cannot be read; use a client of the server's own release");
    }
    this.#seed = seed;
    side.proof = rawProof(chunk) ?? side.proof;
    let text = "";
    for (const choice of Array.isArray(chunk["choices"]) ? chunk["choices"] : []) {
      text += choice.text || choice.delta?.content || "";
      side.finish_reason = choice.finish_reason ?? side.finish_reason;
    }
    side.text += text;
    return { arm: name, text };
  }

  #end(): void {
    if (this.#seed === null) {
      throw new NotAppliedError("the comparison is empty: the server is no Trimtab server, or a proxy dropped it");
    }
    const arms = Object.fromEntries([...this.#arms].map(([name, side]) => [name, this.#reply(name, side)]));
    this.#whole = { seed: this.#seed, arms };
  }

  #reply(name: string, { asked, text, finish_reason, proof }: Side): ArmReply {
    const reply = { steering: proof, _request_id: this.#body.request_id };
    try {
      return { text, finish_reason, steering: mustBeApplied(asked) ? requireApplied(reply) : appliedOf(reply) };
    } catch (error) {
      if (!(error instanceof NotAppliedError)) throw error;
      throw new NotAppliedError(`arm "${name}": ${error.message}`, { request_id: error.request_id, cause: error });
    }
  }
}
