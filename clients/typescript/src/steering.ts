/** `/v1/steering`: what can be steered, and whether a request would be. */

import { TrimtabError, isRecord } from "./errors.js";
import { requireApplied, type Applied } from "./proof.js";
import { proven, type ChatMessage } from "./replies.js";
import { fieldOf, mustBeApplied, type Steering } from "./spec.js";
import type { CallOptions, Request, Transport } from "./transport.js";
import type { SteeringField } from "./wire.js";

/** A bundle that is loaded in the server. */
export interface BundleSummary {
  /** What requests call it. */
  name: string;
  content_hash: string;
  /** One sentence: what the positive completions do. */
  behaviour: string;
  /** The one model that its rows were made for. */
  model: string;
  hook_point: string;
  n_latents: number;
  n_vectors: number;
  /** What it applies when a request names it alone. */
  edits: Record<string, unknown>[];
  /** It can be neither replaced nor removed. */
  pinned: boolean;
}

/** A latent that a bundle holds, with its evidence; what was not measured is null. */
export interface BundleLatent {
  /** Its index in the SAE. */
  latent: number;
  /** What it seems to mean, for people. */
  label: string | null;
  /** Predicted share in the behaviour. */
  attribution: number | null;
  /** What intervening did, measured. */
  effect: number | null;
  /** Largest activation on the SAE's own data, SAE units: the unit `max_act`. */
  max_activation: number;
  /** Strengths that were measured and kept the text coherent. */
  strength_range: [number, number] | null;
  top_tokens: string[];
  [field: string]: unknown;
}

/** A bundle's own description. */
export interface Bundle {
  name: string;
  content_hash: string;
  behaviour: string;
  hook_point: string;
  pinned: boolean;
  latents: BundleLatent[];
  [field: string]: unknown;
}

/** What the server would do with some edits. */
export interface Validation {
  /** Canonical hash; the same edits spelt differently have the same. */
  plan: string;
  bundles: string[];
  /** Where they act. */
  hook_points: string[];
  /** Rows of the formula that they compile to; 0 does nothing. */
  n_rows: number;
}

export interface InspectParams {
  /** This or `messages`. */
  prompt?: string | readonly number[];
  messages?: readonly ChatMessage[];
  /** Per token; 5. */
  top_count?: number;
  /** What to steer while it is read. */
  steering?: Steering | SteeringField;
}

/** A text, token by token. */
export interface Inspection {
  hook_point: string;
  /** Of the bundle. */
  content_hash: string;
  /** What fires on each, strongest first; nothing on the first one, the attention sink. */
  tokens: { id: number; text: string; latents: { latent: number; activation: number; fraction_of_max: number }[] }[];
  /** What was applied while it was read. */
  readonly steering: Applied;
}

export class SteeringRoutes {
  readonly #transport: Transport;

  /** @internal */
  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** The bundles that are loaded, by name. */
  async bundles(options?: CallOptions): Promise<BundleSummary[]> {
    return (await this.#ask<{ data: BundleSummary[] }>({ method: "GET", path: "/steering/bundles" }, ["data"], options)).data;
  }

  /**
   * One bundle with its latents and their evidence.
   *
   * @throws UnknownBundleError the bundle is not loaded.
   */
  bundle(name: string, options?: CallOptions): Promise<Bundle> {
    return this.#ask({ method: "GET", path: pathOf(name) }, ["name", "latents"], options);
  }

  /** The latents that a bundle holds. */
  async latents(bundle: string, options?: CallOptions): Promise<BundleLatent[]> {
    return (await this.bundle(bundle, options)).latents;
  }

  /**
   * The bundle of these bytes (those of its file), now in every worker; loading it again changes nothing.
   *
   * A server started with `--allow-bundle-upload` takes it without a pause. Requests that run on a replaced bundle keep it.
   *
   * @throws InvalidBundleError the bytes are no bundle, or one of another model.
   * @throws ConflictError another bundle has its name, and is not to be replaced, or is pinned.
   */
  load(bytes: Uint8Array, options: CallOptions & { replace?: boolean; pin?: boolean } = {}): Promise<BundleSummary> {
    const { replace = false, pin = false, ...rest } = options;
    const query = new URLSearchParams({ ...(replace && { replace: "true" }), ...(pin && { pin: "true" }) });
    const path = `/steering/bundles${query.size ? `?${query}` : ""}`;
    return this.#ask({ method: "POST", path, body: bytes }, ["name"], rest);
  }

  /** No request can name the bundle from now on; those that run on it keep it to their end. */
  async unload(bundle: string, options?: CallOptions): Promise<void> {
    await this.#ask({ method: "DELETE", path: pathOf(bundle) }, [], options);
  }

  /** The bundle, which can be neither replaced nor removed now. */
  pin(bundle: string, options?: CallOptions): Promise<BundleSummary> {
    return this.#ask({ method: "PUT", path: `${pathOf(bundle)}/pin` }, ["name"], options);
  }

  /** The bundle, which can be replaced and removed again. */
  unpin(bundle: string, options?: CallOptions): Promise<BundleSummary> {
    return this.#ask({ method: "DELETE", path: `${pathOf(bundle)}/pin` }, ["name"], options);
  }

  /**
   * The plan that the server makes of these edits; nothing is run.
   *
   * @throws InvalidSteeringError it refuses them, and says why.
   */
  validate(steering: Steering | SteeringField, options?: CallOptions): Promise<Validation> {
    return this.#ask({ method: "POST", path: "/steering/validate", body: { steering } }, ["plan", "n_rows"], options);
  }

  /**
   * The latents of a bundle that are most active on each token of a text, which the engine runs once for that.
   *
   * @throws NotAppliedError it was to be run under edits, and was not.
   */
  async inspect(bundle: string, params: InspectParams, options?: CallOptions): Promise<Inspection> {
    const body = { bundle, top_count: 5, ...params };
    const request: Request = { method: "POST", path: "/steering/inspect", body };
    const found = await this.#ask<Inspection>(request, ["tokens", "hook_point"], options);
    if (mustBeApplied(fieldOf(params.steering))) requireApplied(found);
    return found;
  }

  /** The answer, which must have these fields. */
  async #ask<Answer>(request: Request, fields: readonly string[], options?: CallOptions): Promise<Answer> {
    const { document, request_id } = await this.#transport.ask(request, options);
    if (!isRecord(document) || fields.some((field) => !(field in document))) {
      throw new TrimtabError(
        "the server's answer cannot be read; use a client of the server's own release, and check that the URL is a Trimtab server's",
        { request_id },
      );
    }
    return request.path === "/steering/inspect" ? proven<Answer>(document, request_id) : (document as Answer);
  }
}

function pathOf(name: string): string {
  return `/steering/bundles/${encodeURIComponent(name)}`;
}
