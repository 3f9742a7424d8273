/**
 * What to steer: frozen values that become the `steering` field of a request.
 *
 *     new Steering({ bundle: "calm", strength: 0.8 })                              the recommended edits of a bundle
 *     new Steering({ edits: [latent("calm", 5120).clamp(0).during("completion")] })   edits of your own
 *     new Steering({ edits: [vector("calm", "difference_in_means").add(0.5, { unit: "resid_norm" })] })
 *
 *     latent("calm", 5120).ablate().window(-5, 0, { origin: "prompt_end" })        the last five tokens of the prompt
 *     latent("calm", 5120).clamp(0).gated(77, { above: 1.5, mode: "onward" })      once latent 77 has fired above 1.5
 *     latent("calm", 5120).scale(3).excludingSpecial()                             not on the chat template's marks
 *
 * Strength multiplies: 0 is off, 1 as authored. What can be seen to be wrong without a server throws at once; the rest
 * (bundles, latents, ranges) is the server's to refuse. Fields have the wire's names, as in the `openai` SDK.
 */

import { InvalidSteeringError } from "./errors.js";
import type { Edit as EditField, Gate, PositionWindow, Scope, SteeringField } from "./wire.js";

export const MAX_EDITS = 64;
export const MAX_STRENGTH = 100;

export type Operation = EditField["operation"];
export type Unit = NonNullable<EditField["unit"]>;
export type Tokens = NonNullable<Scope["tokens"]>;
export type Origin = NonNullable<PositionWindow["origin"]>;
export type GateMode = NonNullable<Gate["mode"]>;
export type OnFailure = NonNullable<SteeringField["on_failure"]>;

/** One operation on one direction; `latent` and `vector` make it, and each method gives a new one. */
export class Edit {
  readonly #field: EditField;

  /** @internal */
  constructor(field: EditField) {
    for (const name of ["amount", "target", "factor"] as const) {
      const value = field[name];
      if (value !== undefined && value !== null) finite(name, value);
    }
    if (field.strength !== undefined) withinStrength(field.strength);
    this.#field = field;
    Object.freeze(this);
  }

  /** The same edit on the prompt's tokens, the completion's, or all; `first_token`: position 0 too, the attention sink. */
  during(tokens: Tokens, { first_token = false }: { first_token?: boolean } = {}): Edit {
    const { tokens: _, first_token: __, ...rest } = this.#field.scope ?? {};
    return this.#scoped({ ...rest, ...(tokens !== "all" && { tokens }), ...(first_token && { first_token }) });
  }

  /**
   * The same edit on the tokens of a half-open window: counted from the start, from the prompt's end (negative before it),
   * or by completion token. An end that is left out (or null) is open.
   */
  window(start?: number | null, stop?: number | null, { origin = "start" }: { origin?: Origin } = {}): Edit {
    if (origin !== "prompt_end" && Math.min(start ?? 0, stop ?? 0) < 0) {
      throw invalid("steering.window", `positions from \`${origin}\` are not negative; \`prompt_end\` counts backwards`);
    }
    if (start != null && stop != null && start >= stop) {
      throw invalid("steering.window", `holds no token: it is half open, and ${start} is not before ${stop}`);
    }
    const window = { origin, ...(start != null && { start }), ...(stop != null && { stop }) };
    return this.#scoped({ ...this.#field.scope, window });
  }

  /** The same edit, but not on special tokens, such as the marks of a chat template. */
  excludingSpecial(): Edit {
    return this.#scoped({ ...this.#field.scope, exclude_special: true });
  }

  /** The same edit where another latent's activation is `above`; `onward`: from the first such token of its scope on. */
  gated(
    latent: number,
    { above, unit = "raw", mode = "token", bundle }: { above: number; unit?: "raw" | "max_act"; mode?: GateMode; bundle?: string },
  ): Edit {
    finite("gate.above", above);
    if (above < 0) {
      throw invalid("steering.gate.above", `${above} is negative, and an activation never is; 0 is wherever it fires`);
    }
    const gate: Gate = {
      ...(bundle !== undefined && { bundle }),
      latent,
      above,
      ...(unit !== "raw" && { unit }),
      ...(mode !== "token" && { mode }),
    };
    return new Edit({ ...this.#field, gate });
  }

  /** The same edit at another strength. */
  at(strength: number): Edit {
    const { strength: _, ...rest } = this.#field;
    return new Edit({ ...rest, ...(strength !== 1 && { strength }) });
  }

  /** The edit as JSON, with defaults left out. */
  toJSON(): EditField {
    return structuredClone(this.#field);
  }

  #scoped(scope: Scope): Edit {
    const { scope: _, ...rest } = this.#field;
    return new Edit(Object.keys(scope).length ? { ...rest, scope } : rest);
  }
}

/** A latent that a bundle holds, by its index in the SAE; each method is one operation on it. */
export class Latent {
  constructor(
    readonly bundle: string,
    readonly latent: number,
  ) {
    Object.freeze(this);
  }

  /** Adds `amount` of the decoder direction, whatever the activation. */
  add(amount: number, { unit = "raw" }: { unit?: Unit } = {}): Edit {
    return this.#edit({ operation: "add", amount, ...(unit !== "raw" && { unit }) });
  }

  /** Removes the latent's own contribution. */
  ablate(): Edit {
    return this.#edit({ operation: "ablate" });
  }

  /** Sets the activation to `target`. */
  clamp(target: number, { unit = "raw" }: { unit?: Unit } = {}): Edit {
    return this.#edit({ operation: "clamp", target, ...(unit !== "raw" && { unit }) });
  }

  /** Multiplies the activation by `factor`. */
  scale(factor: number): Edit {
    return this.#edit({ operation: "scale", factor });
  }

  /** Replaces the stream's projection on the direction by its baseline. */
  project(): Edit {
    return this.#edit({ operation: "project" });
  }

  #edit(operation: Omit<EditField, "bundle" | "latent">): Edit {
    return new Edit({ bundle: this.bundle, latent: this.latent, ...operation });
  }
}

/** A dense direction that a bundle holds, by name: it can be added or projected out. */
export class Vector {
  constructor(
    readonly bundle: string,
    readonly vector: string,
  ) {
    Object.freeze(this);
  }

  /** Adds `amount` of the vector. */
  add(amount: number, { unit = "raw" }: { unit?: "raw" | "resid_norm" } = {}): Edit {
    const direction = { bundle: this.bundle, vector: this.vector };
    return new Edit({ ...direction, operation: "add", amount, ...(unit !== "raw" && { unit }) });
  }

  /** Removes the stream's projection on the vector. */
  project(): Edit {
    return new Edit({ bundle: this.bundle, vector: this.vector, operation: "project" });
  }
}

/** A latent of a bundle. */
export function latent(bundle: string, index: number): Latent {
  return new Latent(bundle, index);
}

/** A dense vector of a bundle. */
export function vector(bundle: string, name: string): Vector {
  return new Vector(bundle, name);
}

/** The `steering` field of a request: a bundle's recommended edits, or edits of your own. */
export class Steering {
  readonly bundle: string | null;
  readonly edits: readonly Edit[];
  /** Multiplies every edit; 0 is off, 1 as authored. */
  readonly strength: number;
  /**
   * `closed`: a reply that was not steered as asked is an error. `open`: it is returned, and says so. null: the server's
   * default, which is `closed` unless its operator said otherwise.
   */
  readonly on_failure: OnFailure | null;

  constructor(asked: { bundle?: string; edits?: Iterable<Edit>; strength?: number; on_failure?: OnFailure }) {
    const edits = [...(asked.edits ?? [])];
    if ((asked.bundle === undefined) === (edits.length === 0)) {
      throw invalid("steering", "give exactly one of `bundle` (its recommended edits) and `edits`");
    }
    if (edits.length > MAX_EDITS) {
      throw invalid("steering.edits", `${edits.length} edits are more than ${MAX_EDITS}; merge or drop some`);
    }
    this.bundle = asked.bundle ?? null;
    this.edits = Object.freeze(edits);
    this.strength = asked.strength ?? 1;
    this.on_failure = asked.on_failure ?? null;
    withinStrength(this.strength);
    Object.freeze(this);
  }

  /** The same edits at another strength. */
  at(strength: number): Steering {
    return new Steering({
      ...(this.bundle !== null ? { bundle: this.bundle } : { edits: this.edits }),
      strength,
      ...(this.on_failure !== null && { on_failure: this.on_failure }),
    });
  }

  /** The `steering` field as JSON, with defaults left out. */
  toJSON(): SteeringField {
    return {
      ...(this.bundle !== null ? { bundle: this.bundle } : { edits: this.edits.map((edit) => edit.toJSON()) }),
      ...(this.strength !== 1 && { strength: this.strength }),
      ...(this.on_failure !== null && { on_failure: this.on_failure }),
    };
  }

  /** Fields for the body of the stock `openai` SDK: `client.chat.completions.create({ model, messages, ...calm.openai() })`. */
  openai(): { steering: SteeringField } {
    return { steering: this.toJSON() };
  }
}

/** The `steering` field of whatever says what to steer; null is nothing. */
export function fieldOf(steering: Steering | SteeringField | null | undefined): SteeringField | null {
  if (steering == null) return null;
  return "toJSON" in steering ? steering.toJSON() : steering;
}

/** Whether a reply without proof of these edits is an error: they ask for something, and not to fail open. */
export function mustBeApplied(field: SteeringField | null): boolean {
  if (field === null || field.on_failure === "open" || field.strength === 0) return false;
  return !field.edits?.length || field.edits.some((edit) => edit.strength !== 0);
}

function finite(field: string, value: number): void {
  if (!Number.isFinite(value)) throw invalid(`steering.${field}`, `${value} is not a finite number`);
}

function withinStrength(value: number): void {
  finite("strength", value);
  if (Math.abs(value) > MAX_STRENGTH) {
    throw invalid("steering.strength", `${value} is outside -${MAX_STRENGTH}..${MAX_STRENGTH}; 1 is as authored`);
  }
}

function invalid(field: string, message: string): InvalidSteeringError {
  return new InvalidSteeringError(`${field}: ${message}`, { param: field, violations: [{ field, message }] });
}
