/**
 * The proof in a reply: what the engine counted while it steered, and `requireApplied`, which accepts nothing less.
 *
 * It reads any reply that carries a `steering` object: this client's, the stock `openai` SDK's, a chunk of a stream.
 */

import { NotAppliedError, isRecord } from "./errors.js";

/** What was applied at one hook point. */
export interface HookPoint {
  /** Prompt positions in scope, edited in this request's own forward passes. */
  readonly prompt_tokens: number;
  /** Positions in scope that predict completion tokens, likewise. */
  readonly completion_tokens: number;
  /** Prompt positions in scope whose edited state came from the prefix cache. */
  readonly cached_prompt_tokens: number;
  /** Of those that were not cached, the positions on which a gate was open. */
  readonly gate_firings: number;
  /** Of the same, those that an edit left alone because their token is special. */
  readonly special_tokens: number;
  /** Largest ‖Δ‖/‖h‖ over the same. */
  readonly max_relative_norm: number;
  /** Mean ‖Δ‖/‖h‖ over the same. */
  readonly mean_relative_norm: number;
}

/** What was applied to one reply, counted where it was applied. */
export interface Applied extends HookPoint {
  /** `applied`, `not_requested` or `failed_open`; `requested` in the first chunk of a stream. */
  readonly status: string;
  /** Canonical hash of the edits; the same edits spelt differently have the same. */
  readonly plan: string | null;
  readonly bundles: readonly string[];
  /** By name, `blocks.14.resid_post`. */
  readonly hook_points: Readonly<Record<string, HookPoint>>;
  /** Why the reply was not steered as asked, when it failed open. */
  readonly reason: string | null;
  /** Edited tokens in all, those from the prefix cache too. */
  readonly n_tokens: number;
}

/**
 * The proof that a reply carries.
 *
 * @throws NotAppliedError it carries none, or one that cannot be read.
 */
export function appliedOf(reply: unknown): Applied {
  const raw = rawProof(reply);
  if (raw === null) {
    throw new NotAppliedError(
      "the reply carries no `steering` object: the server is no Trimtab server, or a proxy dropped it; " +
        "nothing shows that the reply was steered",
      { request_id: requestId(reply) },
    );
  }
  try {
    const counted = counts(raw);
    const points = Object.entries(record(raw["hook_points"] ?? {})).map(([name, point]) => [name, counts(record(point))]);
    return Object.freeze({
      status: string(raw["status"]),
      plan: raw["plan"] == null ? null : string(raw["plan"]),
      bundles: strings(raw["bundles"] ?? []),
      ...counted,
      hook_points: Object.fromEntries(points) as Record<string, HookPoint>,
      reason: raw["reason"] == null ? null : string(raw["reason"]),
      n_tokens: counted.prompt_tokens + counted.completion_tokens + counted.cached_prompt_tokens,
    });
  } catch (cause) {
    throw new NotAppliedError(
      `the reply's \`steering\` object cannot be read (${(cause as Error).message}); use a client of the server's own release`,
      { request_id: requestId(reply), cause },
    );
  }
}

/**
 * The proof of a reply that was steered as asked; of a stream, give the last chunk.
 *
 * @throws NotAppliedError the reply carries no proof, its status is not `applied`, it names no plan, or no token was edited.
 */
export function requireApplied(reply: unknown): Applied {
  const applied = appliedOf(reply);
  let problem: string;
  if (applied.status !== "applied") problem = `its status is "${applied.status}"`;
  else if (!applied.plan) problem = "its proof names no plan";
  else if (applied.n_tokens === 0) problem = "not one token was in scope and edited";
  else return applied;
  throw new NotAppliedError(`the reply was not steered as asked: ${problem}`, { request_id: requestId(reply) });
}

/** The reply's `steering` object as it came; null if there is none. */
export function rawProof(reply: unknown): Record<string, unknown> | null {
  if (!isRecord(reply)) return null;
  const holder = isRecord(reply["response"]) ? reply["response"] : reply; // an event of `/v1/responses` holds the response
  const descriptor = Object.getOwnPropertyDescriptor(holder, "steering");
  return isRecord(descriptor?.value) ? descriptor.value : null;
}

function counts(raw: Record<string, unknown>): HookPoint {
  return Object.freeze({
    prompt_tokens: number(raw["prompt_tokens"]),
    completion_tokens: number(raw["completion_tokens"]),
    cached_prompt_tokens: number(raw["cached_prompt_tokens"]),
    gate_firings: number(raw["gate_firings"]),
    special_tokens: number(raw["special_tokens"]),
    max_relative_norm: number(raw["max_relative_norm"]),
    mean_relative_norm: number(raw["mean_relative_norm"]),
  });
}

/** A count; 0 where a release that does not have it left it out. */
function number(value: unknown): number {
  if (value == null) return 0;
  if (typeof value !== "number" || !Number.isFinite(value)) throw new TypeError(`${JSON.stringify(value)} is no number`);
  return value;
}

function string(value: unknown): string {
  if (typeof value !== "string") throw new TypeError(`${JSON.stringify(value)} is no text`);
  return value;
}

function strings(value: unknown): readonly string[] {
  if (!Array.isArray(value)) throw new TypeError(`${JSON.stringify(value)} is no list`);
  return Object.freeze(value.map(string));
}

function record(value: unknown): Record<string, unknown> {
  if (!isRecord(value)) throw new TypeError(`${JSON.stringify(value)} is no object`);
  return value;
}

function requestId(reply: unknown): string | null {
  const value = isRecord(reply) ? reply["_request_id"] : null;
  return typeof value === "string" ? value : null;
}
