/** One request over `fetch`, asked again before the first byte of a reply alone, and never when the server says not to. */

import { CallError, type TrimtabError, errorOf } from "./errors.js";
import type { Body } from "./events.js";

export interface ClientOptions {
  /** Default: `TRIMTAB_API_KEY` of the environment, else none. */
  apiKey?: string;
  /** Milliseconds until a reply is complete or, if it streams, begins; 300 000, for Node's `fetch` waits no longer. */
  timeout?: number;
  /** How often a request is asked again; 2. */
  maxRetries?: number;
  /** In place of the global one, for proxies, certificates and the like. */
  fetch?: typeof fetch;
}

export interface CallOptions {
  /** Ends the call, or the stream; the server aborts it. */
  signal?: AbortSignal;
}

export interface Request {
  readonly method: "GET" | "POST" | "PUT" | "DELETE";
  /** Under `/v1`. */
  readonly path: string;
  /** JSON, or the bytes of a file. */
  readonly body?: object;
}

const RETRIED = new Set([408, 409, 429]);
const MAX_DELAY = 60_000;

export class Transport {
  readonly #root: string;
  readonly #key: string | undefined;
  readonly #timeout: number;
  readonly #maxRetries: number;
  readonly #fetch: typeof fetch;

  constructor(baseURL: string, options: ClientOptions) {
    const { protocol } = new URL(baseURL);
    if (protocol !== "http:" && protocol !== "https:") {
      throw new TypeError(`${baseURL} is no http(s) URL; give the server's root, such as http://127.0.0.1:8000`);
    }
    this.#root = baseURL.replace(/\/+$/, "").replace(/\/v1$/, "") + "/v1";
    this.#key = options.apiKey ?? globalThis.process?.env?.["TRIMTAB_API_KEY"];
    this.#timeout = options.timeout ?? 300_000;
    this.#maxRetries = options.maxRetries ?? 2;
    this.#fetch = options.fetch ?? globalThis.fetch;
  }

  /** The JSON of an answer, and its request id. */
  async ask(request: Request, options: CallOptions = {}): Promise<{ document: unknown; request_id: string | null }> {
    const { response, signal, release } = await this.#open(request, options);
    const request_id = response.headers.get("x-request-id");
    try {
      return { document: await response.json(), request_id };
    } catch (cause) {
      options.signal?.throwIfAborted();
      const [message, code] = signal.aborted
        ? [`the reply took longer than ${this.#timeout} ms`, "timeout"]
        : ["the server's answer cannot be read; check that the URL is a Trimtab server's", "unreadable"];
      throw new CallError(message, { code, status: response.status, request_id, cause });
    } finally {
      release();
    }
  }

  /** A body that streams, begun. */
  async stream(request: Request, options: CallOptions = {}): Promise<Body & { cancel(): void }> {
    const { response, signal, release, cancel } = await this.#open(request, options);
    release(); // of the time limit: it has begun
    const request_id = response.headers.get("x-request-id");
    const type = response.headers.get("content-type") ?? "nothing";
    if (response.body === null || !type.startsWith("text/event-stream")) {
      cancel();
      throw new CallError(`a stream was asked for, and ${type} came`, { code: "unreadable", status: response.status, request_id });
    }
    return { bytes: response.body, request_id, signal, cancel };
  }

  /** The first good response. */
  async #open(request: Request, { signal }: CallOptions) {
    for (let retries = this.#maxRetries; ; retries--) {
      const attempt = await this.#try(request, signal);
      if ("response" in attempt) return attempt;
      if (retries <= 0 || !attempt.mayRetry) throw attempt.error;
      await sleep(attempt.delay ?? backoff(this.#maxRetries - retries), signal);
    }
  }

  async #try(request: Request, callers: AbortSignal | undefined) {
    callers?.throwIfAborted();
    const limit = new AbortController();
    const timer = setTimeout(() => limit.abort(), this.#timeout);
    const signal = callers ? AbortSignal.any([callers, limit.signal]) : limit.signal;
    const release = () => clearTimeout(timer);
    const cancel = () => limit.abort();
    let response: Response | undefined;
    try {
      const fetch = this.#fetch; // called as a function: a browser's own refuses to be anybody's method
      response = await fetch(this.#root + request.path, { ...this.#init(request), signal });
      if (response.ok) return { response, signal, release, cancel };
      const text = await response.text();
      release();
      return failed(response, text);
    } catch (cause) {
      release();
      callers?.throwIfAborted();
      const [message, code] = limit.signal.aborted
        ? [`no reply in ${this.#timeout} ms`, "timeout"]
        : [`no connection to ${this.#root}; is the server running?`, "connection"];
      return { error: new CallError(message, { code, status: response?.status ?? null, cause }), mayRetry: true, delay: null };
    }
  }

  #init({ method, body }: Request): RequestInit {
    const headers: Record<string, string> = { accept: "application/json, text/event-stream" };
    if (this.#key) headers["authorization"] = `Bearer ${this.#key}`;
    if (body === undefined) return { method, headers };
    const isFile = body instanceof Uint8Array;
    headers["content-type"] = isFile ? "application/octet-stream" : "application/json";
    return { method, headers, body: isFile ? (body as Uint8Array<ArrayBuffer>) : JSON.stringify(body) };
  }
}

function failed({ status, headers }: Response, text: string): { error: TrimtabError; mayRetry: boolean; delay: number | null } {
  let document: unknown = null;
  try {
    document = JSON.parse(text);
  } catch {
    // A proxy's page: the status says what there is to say.
  }
  const said = headers.get("x-should-retry");
  const mayRetry = said === null ? RETRIED.has(status) || status >= 500 : said === "true";
  return { error: errorOf(document, { status, request_id: headers.get("x-request-id") }), mayRetry, delay: delayOf(headers) };
}

/** Milliseconds that the server asks for; null if it asks for none, or for more than anyone would wait. */
function delayOf(headers: Headers): number | null {
  const exact = headers.get("retry-after-ms");
  const rough = headers.get("retry-after");
  let delay = NaN;
  if (exact !== null) delay = Number(exact);
  else if (rough !== null) delay = Number.isNaN(Number(rough)) ? Date.parse(rough) - Date.now() : Number(rough) * 1000;
  return delay > 0 && delay <= MAX_DELAY ? delay : null;
}

/** Half a second, doubled each time, up to eight, less up to a quarter by chance. */
function backoff(retried: number): number {
  return Math.min(500 * 2 ** retried, 8000) * (1 - Math.random() / 4);
}

function sleep(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
