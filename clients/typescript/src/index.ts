export { Trimtab, type ChatCompletions, type Completions } from "./client.js";
export {
  type Arm,
  type ArmReply,
  type Arms,
  type CompareParams,
  type Comparison,
  type ComparisonStream,
  type Piece,
} from "./comparison.js";
export {
  CallError,
  ConflictError,
  InvalidBundleError,
  InvalidSteeringError,
  NotAppliedError,
  TrimtabError,
  UnknownBundleError,
  UnsupportedError,
  type Violation,
} from "./errors.js";
export { appliedOf, requireApplied, type Applied, type HookPoint } from "./proof.js";
export type {
  ChatCompletion,
  ChatCompletionChunk,
  ChatMessage,
  ChatParams,
  Completion,
  CompletionChunk,
  CompletionParams,
  Usage,
} from "./replies.js";
export {
  Latent,
  MAX_EDITS,
  MAX_STRENGTH,
  Steering,
  Vector,
  latent,
  vector,
  type Edit,
  type GateMode,
  type OnFailure,
  type Operation,
  type Origin,
  type Tokens,
  type Unit,
} from "./spec.js";
export type {
  Bundle,
  BundleLatent,
  BundleSummary,
  InspectParams,
  Inspection,
  SteeringRoutes,
  Validation,
} from "./steering.js";
export type { ReplyStream } from "./stream.js";
export type { CallOptions, ClientOptions } from "./transport.js";
export type { SteeringField } from "./wire.js";
