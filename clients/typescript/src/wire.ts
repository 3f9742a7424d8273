// Generated from the server's JSON Schema of the `steering` field; `make typescript-wire` makes it again.

/**
 * The `steering` field of a request: a bundle's recommended edits, or free-form edits.
 */
export interface SteeringField {
  bundle?: string | null;
  edits?: Edit[] | null;
  strength?: number;
  on_failure?: "closed" | "open";
}
/**
 * One free-form edit of a request.
 */
export interface Edit {
  bundle: string;
  latent?: number | null;
  vector?: string | null;
  operation: "add" | "ablate" | "clamp" | "scale" | "project";
  amount?: number | null;
  target?: number | null;
  factor?: number | null;
  unit?: "raw" | "max_act" | "resid_norm";
  strength?: number;
  scope?: Scope;
  gate?: Gate | null;
}
/**
 * Which tokens an edit touches.
 */
export interface Scope {
  tokens?: "prompt" | "completion" | "all";
  window?: PositionWindow | null;
  exclude_special?: boolean;
  first_token?: boolean;
}
/**
 * A half-open window of positions, [start, stop) from an origin; null is open.
 */
export interface PositionWindow {
  origin?: "start" | "prompt_end" | "completion";
  start?: number | null;
  stop?: number | null;
}
/**
 * A condition on another latent of the same layer, on the tokens of the edit's scope.
 */
export interface Gate {
  bundle?: string | null;
  latent: number;
  above: number;
  unit?: "raw" | "max_act";
  mode?: "token" | "onward";
}
