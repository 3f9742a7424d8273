/**
 * What can go wrong, typed.
 *
 *     TrimtabError
 *     ├── InvalidSteeringError   the `steering` field breaks the contract; `violations` lists every mistake with its field
 *     ├── UnknownBundleError     a bundle, latent or vector that the server has not loaded
 *     ├── InvalidBundleError     the bytes that were to be loaded are no bundle for the server's model
 *     ├── ConflictError          another bundle has that name, or it is pinned
 *     ├── UnsupportedError       this server, model or engine cannot do it
 *     ├── NotAppliedError        the reply was not steered as asked, or carries no proof that it was
 *     └── CallError              whatever else a call fails of: keys, quotas, time-outs, the connection
 *
 * A call that its caller aborted throws the signal's own reason.
 */

/** One thing wrong with one field. */
export interface Violation {
  /** Path inside the request, `steering.edits[0].latent`. */
  readonly field: string;
  /** What was wrong, the value, the allowed range, the next step. */
  readonly message: string;
}

export interface ErrorFields {
  code?: string;
  param?: string | null;
  violations?: readonly Violation[];
  request_id?: string | null;
  status?: number | null;
  cause?: unknown;
}

/** Base of the tree. */
export class TrimtabError extends Error {
  /** Stable; the server's `error.code`. */
  readonly code: string;
  /** The first field that is wrong. */
  readonly param: string | null;
  readonly violations: readonly Violation[];
  /** Quote it to whoever runs the server; null when the mistake was found before sending. */
  readonly request_id: string | null;
  /** HTTP status; null when the mistake was found before sending, or in the middle of a stream. */
  readonly status: number | null;

  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { cause: fields.cause });
    this.name = new.target.name;
    this.code = fields.code ?? "internal";
    this.param = fields.param ?? null;
    this.violations = fields.violations ?? [];
    this.request_id = fields.request_id ?? null;
    this.status = fields.status ?? null;
  }
}

/** The `steering` field cannot be served as asked; nothing was run. */
export class InvalidSteeringError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "invalid_steering" });
  }
}

/** The server has not loaded that bundle. */
export class UnknownBundleError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "unknown_bundle" });
  }
}

/** The bytes are no bundle, or one that was made for another model. */
export class InvalidBundleError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "invalid_bundle" });
  }
}

/** Another bundle has that name, or the bundle is pinned. */
export class ConflictError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "conflict" });
  }
}

/** This server, model or engine cannot do what was asked. */
export class UnsupportedError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "unsupported" });
  }
}

/** The reply was not steered as asked, or carries no proof that it was. */
export class NotAppliedError extends TrimtabError {
  constructor(message: string, fields: ErrorFields = {}) {
    super(message, { ...fields, code: "steering_not_applied" });
  }
}

/** A call failed, and not of its steering: `code` is the server's, or `connection` or `timeout` where no server answered. */
export class CallError extends TrimtabError {}

const KINDS: Readonly<Record<string, new (message: string, fields: ErrorFields) => TrimtabError>> = {
  invalid_steering: InvalidSteeringError,
  unknown_bundle: UnknownBundleError,
  invalid_bundle: InvalidBundleError,
  conflict: ConflictError,
  unsupported: UnsupportedError,
  steering_not_applied: NotAppliedError,
};

/** The error of an error document, `{"error": {...}}`; `document` is whatever the server sent. */
export function errorOf(document: unknown, fields: { status: number | null; request_id: string | null }): TrimtabError {
  const error = isRecord(document) && isRecord(document["error"]) ? document["error"] : {};
  const code = typeof error["code"] === "string" ? error["code"] : "unknown";
  const message = typeof error["message"] === "string" ? error["message"] : `the server answered ${fields.status}`;
  const listed = Array.isArray(error["violations"]) ? error["violations"] : [];
  const violations = listed
    .filter((item: unknown): item is Violation => isRecord(item) && "field" in item && "message" in item)
    .map(({ field, message }) => ({ field: String(field), message: String(message) }));
  const param = typeof error["param"] === "string" ? error["param"] : null;
  const Kind = Object.hasOwn(KINDS, code) ? KINDS[code]! : CallError;
  return new Kind(message, { ...fields, code, param, violations });
}

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
