/** What is asked for and what comes back, in OpenAI's names; fields that are not named here pass through both ways. */

import { appliedOf, rawProof, type Applied } from "./proof.js";
import type { Steering } from "./spec.js";
import type { SteeringField } from "./wire.js";

export interface ChatMessage {
  role: string;
  content?: unknown;
  [field: string]: unknown;
}

interface Params {
  model: string;
  /** What to steer; a reply without proof of it is an error, unless it says `on_failure: "open"`. */
  steering?: Steering | SteeringField | null;
  max_tokens?: number | null;
  temperature?: number | null;
  top_p?: number | null;
  seed?: number | null;
  n?: number | null;
  stop?: string | readonly string[] | null;
  stream?: boolean | null;
  [field: string]: unknown;
}

export interface ChatParams extends Params {
  messages: readonly ChatMessage[];
}

export interface CompletionParams extends Params {
  prompt: string | readonly string[] | readonly number[] | readonly (readonly number[])[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
}

interface Reply {
  id: string;
  model: string;
  created: number;
  usage?: Usage | null;
  [field: string]: unknown;
}

interface Proven {
  /**
   * What was applied.
   *
   * @throws NotAppliedError the reply carries no proof.
   */
  readonly steering: Applied;
  /** Quote it to whoever runs the server. */
  readonly _request_id: string | null;
}

export interface ChatCompletion extends Reply, Proven {
  choices: { index: number; finish_reason: string | null; message: { role: string; content: string | null; [field: string]: unknown } }[];
}

export interface Completion extends Reply, Proven {
  choices: { index: number; finish_reason: string | null; text: string }[];
}

interface ProvenAtTheEnds {
  /** What was admitted (first chunk) or applied (last chunk); absent in between. */
  readonly steering?: Applied;
}

export interface ChatCompletionChunk extends Reply, ProvenAtTheEnds {
  choices: { index: number; finish_reason: string | null; delta: { role?: string; content?: string | null; [field: string]: unknown } }[];
}

export interface CompletionChunk extends Reply, ProvenAtTheEnds {
  choices: { index: number; finish_reason: string | null; text: string }[];
}

/** The reply with its proof, typed; reading `steering` of one that carries none throws. */
export function proven<R>(document: object, request_id: string | null): R {
  const reply = Object.defineProperty({ ...document }, "_request_id", { value: request_id });
  if (rawProof(reply) !== null) return Object.assign(reply, { steering: appliedOf(reply) }) as R;
  return Object.defineProperty(reply, "steering", { get: () => appliedOf(reply) }) as R;
}
